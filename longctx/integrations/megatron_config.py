"""What Megatron's config and `packed_seq_params` ask of an attention, in our terms; what ours cannot do is refused."""

from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnBackend, AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from longctx.kernels.mask import HeadMasks, Mask, causal, documents, full, sliding_window
from longctx.parallel.schedule import Schedule

# Megatron's names of how context parallelism communicates, and ours.
SCHEDULES = {None: "ring", "p2p": "ring", "all_gather": "all_gather", "a2a": "ulysses"}
CAUSAL = {AttnMaskType.causal: True, AttnMaskType.no_mask: False}
# With documents, `padding` says no more than that there are documents.
CAUSAL_PACKED = CAUSAL | {AttnMaskType.padding_causal: True, AttnMaskType.padding: False}
# Fields that an attention must honour: the values that ours can, and what to do otherwise.
HONOURED: dict[str, tuple[tuple[object, ...], str]] = {
    "attention_dropout": ((0,), "set attention_dropout=0.0"),
    "attention_backend": ((AttnBackend.auto, AttnBackend.local), "leave it out and give kernel=..."),
    "softmax_type": (("vanilla", "off-by-one", "learnable"), "these three are known"),
    "multi_latent_attention": ((False,), "latent attention needs Megatron's own core_attention"),
    "qk_clip": ((False,), "the largest logits are not kept"),
    "log_max_attention_logit": ((False,), "the largest logits are not kept"),
    "fp8_dot_product_attention": ((False,), "attention is computed in 16 bits or more"),
    "fp8_multi_head_attention": ((False,), "attention is computed in 16 bits or more"),
    "batch_invariant_mode": ((False,), "the last bit may differ with the batch size"),
}


def check_config(config: TransformerConfig, *, attention_type: str, attention_dropout: float | None) -> None:
    """Refuse what would otherwise be ignored. `attention_dropout` overrides the config's unless it is None."""
    for name, (values, instead) in HONOURED.items():
        given = getattr(config, name, values[0])  # not every version of megatron-core has every field
        if name == "attention_dropout" and attention_dropout is not None:
            given = attention_dropout
        if given not in values:
            raise ValueError(f"longctx attention cannot honour {name}={getattr(given, 'name', given)}: {instead}")
    if attention_type != "self":
        raise ValueError(f"attention_type must be self; given {attention_type}")


def schedule_of(schedule: Schedule | str | None, cp_comm_type: str | None) -> Schedule | str:
    """Return the schedule, from our argument and Megatron's config, which must not contradict each other."""
    if schedule is None and cp_comm_type in SCHEDULES:
        return SCHEDULES[cp_comm_type]
    if schedule is None:
        raise ValueError(
            f"cp_comm_type={cp_comm_type} is not known here; known are p2p, all_gather, a2a. Or leave it out and give "
            "schedule=... to longctx_core_attention"
        )
    name = schedule if isinstance(schedule, str) else schedule.name
    if cp_comm_type is not None and SCHEDULES.get(cp_comm_type) != name:
        raise ValueError(f"schedule={name} and cp_comm_type={cp_comm_type} contradict each other: leave one out")
    return schedule


def window_of(left: int, right: int) -> Mask:
    """Return the mask of `config.window_size`: that many tokens before and after a query, -1 for all."""
    return sliding_window(None if left < 0 else left, None if right < 0 else right)


def head_masks_of(mask: Mask | HeadMasks, *, rank: int, size: int) -> Mask | HeadMasks:
    """Return the part of a mask that is for the heads of one of `size` tensor-parallel ranks."""
    if isinstance(mask, Mask):
        return mask
    heads = len(mask.masks) // size
    return HeadMasks(mask.masks[rank * heads : (rank + 1) * heads])


def mask_of(kind: AttnMaskType, bounds: tuple[int, ...] | None) -> Mask:
    """Return the mask of an `attn_mask_type` over one document (None) or those between `bounds`."""
    known = CAUSAL if bounds is None else CAUSAL_PACKED
    if kind not in known:
        raise ValueError(
            f"attn_mask_type={kind.name} is not supported; use {' or '.join(one.name for one in known)}, and "
            "packed_seq_params for documents and padding"
        )
    mask = causal() if known[kind] else full()
    return mask if bounds is None else mask & documents(bounds)


def documents_of(packed: PackedSeqParams, *, total: int) -> tuple[int, ...]:
    """Return the document bounds of a stream of `total` tokens, all cp ranks together; empty documents are left out."""
    if packed.qkv_format != "thd" or packed.cu_seqlens_q is None:
        raise ValueError(f"packed_seq_params needs qkv_format=thd and cu_seqlens_q; given {packed.qkv_format}")
    bounds = _read(packed.cu_seqlens_q)
    for name in ("cu_seqlens_kv", "cu_seqlens_q_padded", "cu_seqlens_kv_padded"):
        other = getattr(packed, name)
        if other is not None and other is not packed.cu_seqlens_q and _read(other) != bounds:
            raise ValueError(
                f"packed_seq_params.{name} must equal cu_seqlens_q: documents need no padding here, and what fills up "
                "the stream is a document of its own"
            )
    if bounds[0] != 0 or bounds[-1] != total:
        raise ValueError(
            f"packed_seq_params.cu_seqlens_q must go from 0 to {total}, the tokens of all cp ranks together; given "
            f"{bounds[0]} to {bounds[-1]}"
        )
    return bounds


_KNOWN_BOUNDS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _read(cu_seqlens: Tensor) -> tuple[int, ...]:
    """Read bounds off their device, once for all layers: each read would wait for the device."""
    version = None if cu_seqlens.is_inference() else cu_seqlens._version
    known = _KNOWN_BOUNDS.get(cu_seqlens)
    if known is not None and version is not None and known[0] == version:
        return known[1]
    bounds = tuple(dict.fromkeys(cu_seqlens.tolist()))
    _KNOWN_BOUNDS[cu_seqlens] = (version, bounds)
    return bounds
