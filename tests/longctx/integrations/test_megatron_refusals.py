"""What the core_attention for megatron-core cannot honour: a ValueError that says what to do instead."""

import importlib.util
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from tests.support.megatron import HEAD_DIM, HEADS, TIMEOUT, Case, build, float32_rope, megatron

if importlib.util.find_spec("megatron") is None:
    pytest.skip("megatron-core is not installed", allow_module_level=True)


@dataclass(frozen=True)
class Refusal:
    """What to give to the builder, the config, the constructor, a PackedSeqParams and `forward`, and the message."""

    message: str
    builder: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    constructor: dict[str, Any] = field(default_factory=dict)
    packed: dict[str, Any] | None = None
    forward: dict[str, Any] = field(default_factory=dict)
    mask: str = "causal"
    cp: int = 2


OWN, LOCAL = {"rope": float32_rope}, torch.tensor([0, 4])
REFUSALS = {
    "dropout": Refusal("attention_dropout=0.1: set attention_dropout=0.0", config={"attention_dropout": 0.1}),
    "dropout_argument": Refusal("attention_dropout=0.2", constructor={"attention_dropout": 0.2}),
    "backend": Refusal("attention_backend=flash: leave it out and give kernel", config={"attention_backend": "flash"}),
    "softmax_type": Refusal("softmax_type=other", config={"softmax_type": "other"}),
    "latent": Refusal("multi_latent_attention=True", config={"multi_latent_attention": True}),
    "qk_clip": Refusal("qk_clip=True", config={"qk_clip": True}),
    "fp8": Refusal("fp8_dot_product_attention=True", config={"fp8_dot_product_attention": True}),
    "cross": Refusal("attention_type must be self; given cross", constructor={"attention_type": "cross"}),
    "cp_size": Refusal("context_parallel_size=4, but pg_collection.cp has 2", cp=4),
    "layout": Refusal("attention.layout=spiral is not known", builder={"layout": "spiral"}),
    "width": Refusal("needs attention.layout=striped", builder={"width": 2}),
    "megatron_rope_striped": Refusal("as if layout were zigzag; given layout=striped", builder={"layout": "striped"}),
    "interleaved": Refusal("rotary_interleaved", builder=OWN, config={"rotary_interleaved": True}),
    "comm_type": Refusal("cp_comm_type=a2a+p2p is not known", constructor={"cp_comm_type": "a2a+p2p"}),
    "two_schedules": Refusal("contradict", builder={"schedule": "ring"}, constructor={"cp_comm_type": "a2a"}),
    "dense_mask": Refusal("attention_mask must be None", forward={"attention_mask": torch.ones(1, 1, 4, 4)}),
    "bias": Refusal("attention_bias must be None", forward={"attention_bias": torch.ones(1)}),
    "padding": Refusal("attn_mask_type=padding is not supported; use causal or no_mask", mask="padding"),
    "arbitrary": Refusal("attn_mask_type=arbitrary", builder=OWN, packed={}, mask="arbitrary"),
    "kv_cache": Refusal("query has 4 tokens and key 6", forward={"key": torch.ones(6, 1, 2, HEAD_DIM)}),
    "megatron_rope_packed": Refusal("each document to be cut zig-zag by itself", packed={}),
    "bshd": Refusal("needs qkv_format=thd", builder=OWN, packed={"qkv_format": "bshd"}),
    "no_bounds": Refusal("and cu_seqlens_q", builder=OWN, packed={"cu_seqlens_q": None}),
    "local_bounds": Refusal("must go from 0 to 8", builder=OWN, packed={"cu_seqlens_q": LOCAL, "cu_seqlens_kv": LOCAL}),
    "padded": Refusal(
        "cu_seqlens_q_padded must equal", builder=OWN, packed={"cu_seqlens_q_padded": torch.tensor([0, 4, 8])}
    ),
    "cross_packed": Refusal("cu_seqlens_kv must equal", builder=OWN, packed={"cu_seqlens_kv": torch.tensor([0, 8])}),
    "local_cp": Refusal("this layer keeps its own, of 2", builder=OWN, packed={"local_cp_size": 1}),
}


def attend_once(case: Refusal) -> None:
    """Build one attention and call it on ones, one of which should raise."""
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.transformer.enums import AttnBackend, AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from longctx.integrations.megatron import longctx_core_attention

    core = longctx_core_attention(**case.builder)
    config = TransformerConfig(num_layers=1, hidden_size=HEADS * HEAD_DIM, num_attention_heads=HEADS)
    config.attention_dropout, config.use_cpu_initialization, config.context_parallel_size = 0.0, True, case.cp
    for name, value in case.config.items():  # not by the constructor, which has conditions of its own
        setattr(config, name, AttnBackend[value] if name == "attention_backend" else value)
    kind = AttnMaskType[case.mask]
    arguments = {"attn_mask_type": kind, "attention_type": "self", "cp_comm_type": None} | case.constructor
    attention = core(config=config, layer_number=1, softmax_scale=None, **arguments)
    shapes = {"query": HEADS, "key": 2, "value": 2}
    tensors = {name: torch.ones(4, 1, heads, HEAD_DIM) for name, heads in shapes.items()}
    packed = None
    if case.packed is not None:
        bounds = torch.tensor([0, 3, 8])
        packed = PackedSeqParams(**{"qkv_format": "thd", "cu_seqlens_q": bounds, "cu_seqlens_kv": bounds} | case.packed)
        tensors = {name: tensor.squeeze(1) for name, tensor in tensors.items()}
    others = {"attention_mask": None, "attn_mask_type": kind, "packed_seq_params": packed}
    attention(**tensors | others | case.forward)


def refusals(rank: int, world_size: int, group: Any) -> dict[str, str]:
    """Return each case's message; every rank must refuse by itself, before it waits for another."""
    messages = {}
    with megatron(cp=world_size):
        attend_once(Refusal(""))
        attend_once(Refusal("", builder=OWN, packed={}))
        for name, case in REFUSALS.items():
            try:
                attend_once(case)
                messages[name] = "was not refused"
            except ValueError as error:
                messages[name] = str(error)
    return messages


def test_what_cannot_be_honoured_is_refused(gloo_pool):
    for messages in gloo_pool.run(refusals, 2, timeout=TIMEOUT):
        for name, case in REFUSALS.items():
            assert case.message in messages[name], name


def positions_checked(rank: int, world_size: int, group: Any) -> dict[tuple[str, str], str]:
    """Return what `check_model` says to a model of each position embedding with each rope."""
    from longctx.integrations.megatron import check_model, longctx_core_attention

    messages = {}
    with megatron(cp=world_size):
        for kind in ("rope", "none", "learned_absolute"):
            for rope in ("megatron", float32_rope, None):
                core = longctx_core_attention(rope=rope)
                model = build(Case(), cp=world_size, core=core, position_embedding=kind)
                try:
                    check_model(model)
                except ValueError as error:
                    messages[kind, getattr(rope, "__name__", str(rope))] = str(error)
    return messages


def test_q_and_k_are_rotated_once(gloo_pool):
    (messages, _) = gloo_pool.run(positions_checked, 2, timeout=TIMEOUT)
    assert set(messages) == {("rope", "float32_rope"), ("rope", "None"), ("none", "megatron")}
    assert all("one of the two must rotate" in message for message in messages.values())
