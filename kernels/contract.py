"""What a local softmax kernel is: one device's arithmetic on a list of tiles. It never sees a rank."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from longctx.kernels.merge import Partial
from longctx.kernels.positions import Tile


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a kernel is asked to serve; a kernel that cannot serve it gives the reason before anything runs.

    Attributes:
        softcap: whether scores are capped.
        predicate: whether the mask has arbitrary predicates, that is tiles that no band describes.
    """

    device_type: str
    dtype: torch.dtype
    head_dim: int
    v_head_dim: int
    num_heads: int
    num_kv_heads: int
    softcap: bool = False
    predicate: bool = False

    def __post_init__(self) -> None:
        if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads; given {self.num_heads} and {self.num_kv_heads} "
                "(model.num_heads, model.num_kv_heads)"
            )


@dataclass(frozen=True, kw_only=True)
class Scores:
    """How a query and a key make a score: `s = softmax_scale q.k`, and with a softcap c then `c tanh(s / c)`.

    Attributes:
        softmax_scale: > 0; usually `head_dim ** -0.5`.
        softcap: > 0; None = scores are not capped (Gemma 2, arXiv 2408.00118, caps at 50).
    """

    softmax_scale: float
    softcap: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.softmax_scale < math.inf:  # ATen's causal kernels give NaN from 0 downwards
            raise ValueError(f"softmax_scale must be a finite number > 0; given {self.softmax_scale}")
        if self.softcap is not None and not 0 < self.softcap < math.inf:
            raise ValueError(f"softcap must be a finite number > 0, or None for no cap; given {self.softcap}")


class LocalKernel(Protocol):
    """Attention of a q shard to a k/v shard over a tile list, continuing from what earlier hops left.

    Shapes: `q, dq [B, Tq, H, D]`, `dout [B, Tq, H, Dv]`, `k, dk [B, Tk, HK, D]`, `v, dv [B, Tk, HK, Dv]`,
    `lse, delta [B, H, Tq]`. HK divides H; query head h reads KV head `h // (H // HK)`; repeated K/V never outlive one
    tile. Accumulators are float32 (float64 for float64 inputs) and are written in place. A query without a visible key
    keeps out 0, lse -inf and gradient 0.
    """

    name: str

    def unsupported(self, request: Request) -> str | None:
        """Return why `request` cannot be served, or None when it can."""
        ...

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, tiles: Sequence[Tile], scores: Scores, partial: Partial
    ) -> None:
        """Merge the tiles' attention into `partial`."""
        ...

    def backward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        tiles: Sequence[Tile],
        scores: Scores,
        dout: Tensor,
        delta: Tensor,
        lse: Tensor,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
    ) -> None:
        """Add the tiles' gradients to `dq, dk, dv`.

        Args:
            dout: in the input dtype.
            delta: rowsum(dout * out) of the out merged over ALL hops, in the accumulators' dtype: all that a backward
                needs of out (FlashAttention-2, arXiv 2307.08691, algorithm 2), Dv times smaller to send.
            lse: merged over ALL hops, a learned sink included.
        """
        ...
