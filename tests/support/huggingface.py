"""Tiny Hugging Face models, one batch for all and how it is cut, and a mode that computes all of it in float64."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from longctx.loss import IGNORED
from longctx.parallel.layout import Layout

TOTAL, BATCH, VOCABULARY = 22, 2, 64
DOCUMENTS = ((0, 9, 10, TOTAL), (0, 3, 16, TOTAL))
ONE = Layout("contiguous", 1)
LAYOUTS = {
    "contiguous": Layout("contiguous", 2),
    "zigzag": Layout("zigzag", 2),
    "striped": Layout("striped", 2),
    "striped3": Layout("striped", 2, width=3),
}
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "attention_dropout": 0.0,
    "pad_token_id": 0,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},  # grouped-query attention
    "qwen3": {},  # norm of q and k
    "qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},  # a window in one of two layers
    "mistral": {"sliding_window": 4},  # a window in all layers
    "llama4_text": {  # chunks in one of two layers
        "attention_chunk_size": 7,
        "layer_types": ["chunked_attention", "full_attention"],
        "intermediate_size_mlp": 48,
        "moe_layers": [],
    },
    "gemma2": {
        "sliding_window": 6,
        "attn_logit_softcapping": 2.0,
        "query_pre_attn_scalar": 11,
    },  # softcap, scale, window
    "gpt_oss": {"sliding_window": 5, "num_local_experts": 3, "num_experts_per_tok": 2},  # sink logits, window
}


def make_config(kind: str) -> PreTrainedConfig:
    return AutoConfig.for_model(kind, **{**SIZES, **MODELS[kind]})


def make_model(kind: str, implementation: str) -> nn.Module:
    """Build a tiny float64 model, the same at every call."""
    config = make_config(kind)
    config._experts_implementation = "eager"  # the default has no float64
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():  # as initialised they are so small that attention hardly matters
            parameter.normal_(std=0.3, generator=generator)
    return model.train()


def make_batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    input_ids = torch.randint(1, VOCABULARY, (BATCH, TOTAL), generator=generator)
    labels = input_ids.clone()
    labels[0, :7] = IGNORED
    return input_ids, labels


class Float64(TorchFunctionMode):
    """Keep float64 where a model asks for float32, as norms, eager softmax and RoPE do, whatever the model's dtype is.

    Rounded to float32 on the way, numbers that differ by 1e-16 may come out 1e-7 apart.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.float:
            return args[0].double()
        args = tuple(torch.float64 if value is torch.float32 else value for value in args)
        named = {key: torch.float64 if value is torch.float32 else value for key, value in (kwargs or {}).items()}
        return func(*args, **named)


def in_float64(function: Callable[..., Any]) -> Callable[..., Any]:
    """Run a function in that mode."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with Float64():
            return function(*args, **kwargs)

    return run
