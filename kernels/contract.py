"""What a local softmax kernel is: one device's arithmetic on a list of tiles. It never sees a rank."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from longctx.kernels.merge import Partial
from longctx.kernels.positions import Tile


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a kernel is asked to serve; a kernel that cannot serve it gives the reason before anything runs."""

    device_type: str
    dtype: torch.dtype
    head_dim: int
    v_head_dim: int
    num_heads: int
    num_kv_heads: int

    def __post_init__(self) -> None:
        if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads; given {self.num_heads} and {self.num_kv_heads} "
                "(model.num_heads, model.num_kv_heads)"
            )


class LocalKernel(Protocol):
    """Attention of a q shard to a k/v shard over a tile list, continuing from what earlier hops left.

    Shapes: `q, out, dout, dq [B, Tq, H, D]`, `k, v, dk, dv [B, Tk, HK, D]`, `lse [B, H, Tq]`. HK divides H; query
    head h reads KV head `h // (H // HK)`; repeated K/V never outlive one tile. Accumulators are float32 (float64 for
    float64 inputs) and are written in place. A query without a visible key keeps out 0, lse -inf and gradient 0.
    """

    name: str

    def unsupported(self, request: Request) -> str | None:
        """Return why `request` cannot be served, or None when it can."""
        ...

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, tiles: Sequence[Tile], softmax_scale: float, partial: Partial
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
        softmax_scale: float,
        dout: Tensor,
        out: Tensor,
        lse: Tensor,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
    ) -> None:
        """Add the tiles' gradients to `dq, dk, dv`; `out` (input dtype) and `lse` are merged over ALL hops."""
        ...
