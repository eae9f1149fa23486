"""What a Hugging Face model may ask of attention, and which models are exact on shards of a sequence."""

from collections.abc import Mapping

from transformers import PreTrainedConfig

NAME = "longctx"
PREFIX = f"attn_implementation={NAME}"
# Keyword arguments of a model's forward that it hands through to its layers, and that attention has no use for.
IRRELEVANT = frozenset(
    {
        "cache_position",
        "labels",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "return_dict",
        "shift_labels",
    }
)
REASONS = {
    "use_cache": "it keeps no keys and values; pass use_cache=False to the model (shard_batch's inputs do)",
    "output_attentions": "attention weights are never formed; use attn_implementation=eager to look at them",
    "cu_seq_lens_q": "documents are cut in global positions; pass cu_seqlens to context_parallel instead",
    "cu_seq_lens_k": "documents are cut in global positions; pass cu_seqlens to context_parallel instead",
    "max_length_q": "document lengths come from cu_seqlens; pass that to context_parallel instead",
    "max_length_k": "document lengths come from cu_seqlens; pass that to context_parallel instead",
}
# Layers that mix tokens by attention through this interface. Others (state spaces, convolutions) mix them elsewhere.
ATTENTION_LAYERS = frozenset({"full_attention", "sliding_attention", "chunked_attention", "attention"})
ROPE_BY_LENGTH = frozenset({"dynamic", "longrope"})


def check_arguments(arguments: Mapping[str, object]) -> None:
    """Refuse keyword arguments of a layer unless they are None, False or known to have no effect on attention."""
    for name, given in arguments.items():
        if name not in IRRELEVANT and given is not None and given is not False:
            reason = REASONS.get(name, "it is not known to be without effect on attention")
            raise ValueError(f"{PREFIX} cannot honour {name}: {reason}")


def check_model(config: PreTrainedConfig) -> None:
    """Refuse models whose results on a shard of a sequence would not be those on the whole."""
    layers = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ()
    if strange := sorted(set(layers) - ATTENTION_LAYERS):
        raise ValueError(
            f"{PREFIX}: {config.model_type} has layers that mix tokens other than by attention ({', '.join(strange)}); "
            "they would see one rank's tokens only. Use cp=1"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {str(part.get("rope_type")) for part in (rope, *rope.values()) if isinstance(part, dict)}
    if by_length := sorted(kinds & ROPE_BY_LENGTH):
        raise ValueError(
            f"{PREFIX}: rope_type={', '.join(by_length)} chooses its frequencies by the largest position of a rank's "
            "own tokens, so ranks would disagree. Use cp=1 or another rope_type (default, linear, yarn, llama3)"
        )
