"""Small GPTModels of megatron-core on CPU ranks. The package is imported inside of functions only: it takes seconds."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

TIMEOUT = 240.0  # seconds; the first call imports megatron-core, 6 s of CPU on every rank
HEADS, HEAD_DIM, VOCABULARY, THETA = 4, 8, 50, 10000


@dataclass(frozen=True)
class Case:
    """One way to build and cut a model. `rope` is whose: the model's, or ours at the layout's positions."""

    layout: str = "striped"
    width: int = 1
    schedule: str | None = None
    rope: str = "ours"
    kv_heads: int = 2
    total: int = 24
    batch: int = 2
    mask: str = "causal"
    cu_seqlens: tuple[int, ...] | None = None
    config: dict[str, Any] = field(default_factory=dict)


class NoCuda(TorchFunctionMode):
    """Let Megatron's RoPE, which pins memory and moves to a GPU, run as it is."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.cuda:
            return args[0]
        return func(*args, **{name: value for name, value in (kwargs or {}).items() if name != "pin_memory"})


@contextlib.contextmanager
def megatron(cp: int, tp: int = 1) -> Iterator[None]:
    """Set up Megatron's global process groups, and take them down."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import initialize_rng_tracker

    initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)
    parallel_state.initialize_model_parallel(tp, context_parallel_size=cp, create_gloo_process_groups=False)
    try:
        with mock.patch("torch.cuda.current_device", return_value="cpu"), NoCuda():
            yield
    finally:
        parallel_state.destroy_model_parallel()


def float32_rope(positions: Tensor) -> tuple[Tensor, Tensor]:
    """Return the table that Megatron computes, whose angles are float32."""
    frequencies = 1.0 / (THETA ** (torch.arange(0, HEAD_DIM, 2, dtype=torch.float32) / HEAD_DIM))
    angles = torch.outer(positions.to(torch.float32), frequencies)
    return angles.cos().double(), angles.sin().double()


def build(case: Case, *, cp: int, core: type, position_embedding: str, tp: int = 1) -> nn.Module:
    """Return a float64 GPTModel of two layers."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    settings = {
        "num_layers": 2,
        "hidden_size": HEADS * HEAD_DIM,
        "ffn_hidden_size": 48,
        "num_attention_heads": HEADS,
        "num_query_groups": case.kv_heads,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "use_cpu_initialization": True,
        "init_method_std": 0.3,  # sharp enough attention that a wrong mask shows
    }
    parallel = {"context_parallel_size": cp, "tensor_model_parallel_size": tp}
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    spec.submodules.self_attention.submodules.core_attention = core
    spec.submodules.self_attention.params["attn_mask_type"] = AttnMaskType[case.mask]
    model = GPTModel(
        TransformerConfig(**settings | parallel | case.config),
        spec,
        vocab_size=VOCABULARY,
        max_sequence_length=case.total,
        position_embedding_type=position_embedding,
        rotary_base=THETA,
    )
    return model.double()
