"""What attn_implementation="longctx" cannot honour it refuses, with the reason."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")

from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from longctx.integrations.huggingface import attention, context_parallel, layer_mask
from longctx.integrations.huggingface_batch import shard_batch
from longctx.integrations.huggingface_checks import NAME, check_model
from longctx.parallel.layout import Layout
from tests.support.huggingface import LAYOUTS, MODELS, ONE, make_batch, make_config, make_model


@pytest.fixture(scope="module")
def llama():
    return make_model("llama", NAME)


IDS = torch.arange(1, 9)[None]
# What is given to the model beside or instead of shard_batch's inputs, and what is said about it.
REFUSED_INPUTS = {
    "cache": ({"use_cache": True}, "cannot honour use_cache"),
    "filled-cache": ({"past_key_values": "filled"}, "takes no key/value cache"),
    "padding": ({"attention_mask": torch.tensor([[1] * 7 + [0]])}, "takes no padding"),
    "dense-mask": (
        {"attention_mask": torch.zeros(1, 1, 8, 8)},
        r"no dense attention mask; given a tensor \(1, 1, 8, 8\)",
    ),
    "attention-weights": ({"output_attentions": True}, "cannot honour output_attentions: attention weights are never"),
    "flash-documents": ({"cu_seq_lens_q": torch.tensor([0, 8])}, "cannot honour cu_seq_lens_q: .*pass cu_seqlens"),
    "unknown": ({"position_bias": torch.zeros(1)}, "cannot honour position_bias: it is not known"),
    "positions": ({"position_ids": torch.arange(1, 9)[None]}, "position_ids must be .* starting with"),
    "restarted-positions": ({"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])}, "position_ids must be"),
}


@pytest.mark.parametrize("case", REFUSED_INPUTS)
def test_refused_inputs(llama, case):
    inputs, message = REFUSED_INPUTS[case]
    inputs = {"input_ids": IDS, "use_cache": False, **inputs}
    if inputs.get("past_key_values"):
        inputs["past_key_values"] = DynamicCache(config=llama.config)
        for index in range(llama.config.num_hidden_layers):
            inputs["past_key_values"].update(torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 8), index)
    with pytest.raises(ValueError, match=message), context_parallel(layout=ONE):
        llama(**inputs)


def test_what_is_without_effect_is_accepted(llama):
    with context_parallel(layout=ONE):
        plain = llama(IDS, use_cache=False).logits
    with context_parallel(layout=ONE, cu_seqlens=[0, 8]):
        mask = torch.ones(1, 8, dtype=torch.int64)
        same = llama(IDS, use_cache=False, attention_mask=mask, output_attentions=False, num_items_in_batch=3).logits
    assert torch.equal(plain, same)


def test_a_model_needs_a_context_and_a_context_needs_the_model(llama):
    with pytest.raises(ValueError, match="needs to know how sequences are shared"):
        llama(IDS, use_cache=False)
    with (
        pytest.raises(ValueError, match="no attention layer ran inside context_parallel"),
        context_parallel(layout=ONE),
    ):
        make_model("llama", "sdpa")(IDS, use_cache=False)
    with (
        pytest.raises(ValueError, match="layout is for cp=2, the group has 1"),
        context_parallel(layout=LAYOUTS["zigzag"]),
    ):
        pass


def test_models_with_an_attention_of_their_own_are_refused():
    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "n_layer": 1,
        "n_head": 4,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("bloom", **sizes), attn_implementation=NAME)
    with pytest.raises(ValueError, match="computes attention itself"), context_parallel(layout=ONE):
        model(IDS, use_cache=False)
    with context_parallel(layout=ONE):
        mask = layer_mask(None, causal=True, sliding_window=None)
        attention(make_model("llama", NAME).model.layers[0].self_attn, *[torch.zeros(1, 4, 8, 8)] * 3, mask)
    with pytest.raises(AttributeError, match=r"computes attention itself.*'dtype'"):
        mask.dtype  # noqa: B018


def test_attention_dropout_is_refused_in_training(llama):
    llama.model.layers[0].self_attn.attention_dropout = 0.1
    try:
        with pytest.raises(ValueError, match=r"no attention dropout; given 0.1"), context_parallel(layout=ONE):
            llama(IDS, use_cache=False)
        with context_parallel(layout=ONE):
            llama.eval()(IDS, use_cache=False)
    finally:
        llama.train().model.layers[0].self_attn.attention_dropout = 0.0


DISAGREEMENTS = {
    "window": ({"sliding_window": 3}, "says sliding_window=3, the model's mask has None"),
    "causal": ({"is_causal": False}, "the layer says is_causal=False"),
    "no-mask": ({"attention_mask": None, "is_causal": False, "sliding_window": 3}, "window=3 on a bidirectional layer"),
    "lengths": ({"key": torch.zeros(1, 2, 7, 8)}, "8 queries, 7 keys"),
    "sinks": ({"s_aux": torch.zeros(1, 4)}, r"s_aux must be \[4\]"),
}


@pytest.mark.parametrize("case", DISAGREEMENTS)
def test_a_layer_its_mask_and_its_tensors_must_agree(llama, case):
    changes, message = DISAGREEMENTS[case]
    with context_parallel(layout=ONE):
        mask = layer_mask(None, causal=True, sliding_window=None)
        q, kv = torch.zeros(1, 4, 8, 8), torch.zeros(1, 2, 8, 8)
        fitting = {"query": q, "key": kv, "value": kv, "attention_mask": mask}
        attention(llama.model.layers[0].self_attn, **fitting)
        with pytest.raises(ValueError, match=message):
            attention(llama.model.layers[0].self_attn, **{**fitting, **changes})


@pytest.mark.parametrize("window", [None, 3])
def test_models_that_ask_for_no_mask(llama, window):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 8, 8, dtype=torch.float64, generator=generator) for heads in (4, 2, 2))
    with context_parallel(layout=ONE):
        out, weights = attention(llama.model.layers[0].self_attn, q, k, v, None, sliding_window=window)
    ones = torch.ones(8, 8, dtype=torch.bool)
    seen = ones.tril() if window is None else ones.tril() & ones.triu(1 - window)
    wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True).transpose(1, 2)
    assert weights is None
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-12)


def test_models_that_are_not_exact_on_shards_are_refused():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    with pytest.raises(ValueError, match="rope_type=dynamic chooses its frequencies"):
        check_model(AutoConfig.for_model("llama", rope_parameters=rope))
    with pytest.raises(ValueError, match=r"mix tokens other than by attention \(linear_attention\)"):
        check_model(AutoConfig.for_model("qwen3_next", num_hidden_layers=4))
    for kind in MODELS:
        check_model(make_config(kind))


def forgotten_positions(rank: int, world_size: int, group, layout: Layout) -> str:
    shard = shard_batch(*make_batch(), layout=layout, rank=rank)
    model = make_model("llama", NAME)
    with (
        pytest.raises(ValueError, match="position_ids must be") as caught,
        context_parallel(layout=layout, group=group),
    ):
        model(shard.inputs["input_ids"], use_cache=False)
    return str(caught.value)


def test_forgotten_positions_are_noticed(gloo_pool):
    """Without position_ids a model counts 0, 1, 2, ... on every rank."""
    messages = gloo_pool.run(forgotten_positions, 2, LAYOUTS["striped"])
    assert "rank 1's tokens in layout striped" in messages[1]
