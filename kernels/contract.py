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


@dataclass(frozen=True)
class Work:
    """Tiles, with the rows of the batch, the query heads and the KV heads that they are for.

    The query heads are whole groups, each of which reads a KV head, or one group or a part of one.
    """

    rows: slice
    heads: slice
    kv_heads: slice
    tiles: tuple[Tile, ...]

    @property
    def q(self) -> tuple[slice, slice, slice]:
        """Index `[B, T, H, D]`."""
        return self.rows, slice(None), self.heads

    @property
    def kv(self) -> tuple[slice, slice, slice]:
        """Index `[B, T, HK, D]`."""
        return self.rows, slice(None), self.kv_heads

    @property
    def lse(self) -> tuple[slice, slice]:
        """Index `[B, H, T]`."""
        return self.rows, self.heads


@dataclass(frozen=True, eq=False)
class WorkList:
    """What one call of a kernel computes. No (row, query head) is in two of its parts.

    Compared by identity, so that a kernel may keep what it made of one for as long as it lives: every layer and step
    with the same plan gets the same object.
    """

    parts: tuple[Work, ...]


def whole(tiles: Sequence[Tile], *, heads: int, kv_heads: int) -> WorkList:
    """Return the same tiles for all rows and heads."""
    return WorkList((Work(slice(None), slice(0, heads), slice(0, kv_heads), tuple(tiles)),))


class LocalKernel(Protocol):
    """Attention of a q shard to a k/v shard over lists of tiles, continuing from what earlier hops left.

    Shapes: `q, dq [B, Tq, H, D]`, `dout [B, Tq, H, Dv]`, `k, dk [B, Tk, HK, D]`, `v, dv [B, Tk, HK, Dv]`,
    `lse, delta [B, H, Tq]`. HK divides H; which KV head a query head reads is said by the work; repeated K/V never
    outlive one tile. Accumulators (`partial`, dq, dk, dv) are float32 (float64 for float64 inputs), their last dim is
    contiguous, and they are written in place. A query without a visible key keeps out 0, lse -inf and gradient 0.
    """

    name: str

    def unsupported(self, request: Request) -> str | None:
        """Return why `request` cannot be served, or None when it can."""
        ...

    def serving(self, work: WorkList) -> str:
        """Return the name of who computes some work: a kernel may leave parts of its work to others."""
        ...

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, work: WorkList, scores: Scores, partial: Partial) -> None:
        """Merge the attention of the work's tiles into `partial`."""
        ...

    def backward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        work: WorkList,
        scores: Scores,
        dout: Tensor,
        delta: Tensor,
        lse: Tensor,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
    ) -> None:
        """Add the gradients of the work's tiles to `dq, dk, dv`.

        Args:
            dout: in the input dtype.
            delta: rowsum(dout * out) of the out merged over ALL hops, in the accumulators' dtype: all that a backward
                needs of out (FlashAttention-2, arXiv 2307.08691, algorithm 2), Dv times smaller to send.
            lse: merged over ALL hops, a learned sink included.
        """
        ...
