"""Norms over the last dim, computed in at least float32."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longctx import liger

HEAD_NORMS = ("none", "rms", "simple_rms", "layer")


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in at least float32 (Zhang and Sennrich, arXiv 1910.07467).

    Args:
        ops: `torch`, or `liger` for its fused kernel.
    """

    def __init__(self, size: int, *, eps: float, ops: str = "torch") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps, self.ops = eps, ops

    def forward(self, x: Tensor) -> Tensor:
        if self.ops == "liger":
            return liger.rms_norm(x, self.weight, eps=self.eps)
        return _over_rms(x, self.eps) * self.weight


class SimpleRMSNorm(nn.Module):
    """x / rms(x), without a weight (TransNormerLLM, arXiv 2307.14995)."""

    def __init__(self, *, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return _over_rms(x, self.eps)


class LayerNorm(nn.Module):
    """(x - mean) / std * weight; over a head it is the group norm of retention (arXiv 2307.08621)."""

    def __init__(self, size: int, *, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(_wide(x), x.shape[-1:], eps=self.eps).to(x.dtype) * self.weight


def head_norm(name: str, size: int, *, eps: float) -> nn.Module:
    """Return the norm called `name` of `HEAD_NORMS` over heads of this size; all heads share its weight."""
    if name == "rms":
        return RMSNorm(size, eps=eps)
    if name == "layer":
        return LayerNorm(size, eps=eps)
    return SimpleRMSNorm(eps=eps) if name == "simple_rms" else nn.Identity()


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype.itemsize >= 4 else x.float()


def _over_rms(x: Tensor, eps: float) -> Tensor:
    wide = _wide(x)
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
