"""Linear attention to what a selection leaves out (Sparse-Linear Attention, arXiv 2509.24006).

The paper computes critical blocks by softmax and the others by linear attention. What is left out is, of all that a
query may see,

    rest = sum over all (phi(q) . phi(k)) v  -  sum over the selected (phi(q) . phi(k)) v

for numerators, and for denominators with v = 1. The first sum is a recurrence, the second as sparse as the selection:
no block's state is ever sent. The difference cancels: its relative error is that of the sums times all / rest, and so
it is computed in float32 at least, from positive features.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from longctx.kernels.merge import accumulator_dtype

FEATURE_MAPS = ("softmax", "elu1")  # positive, so that only a query without a rest has a denominator of 0
_NOISE = 64  # roundings of the sums, up to which their difference says nothing


def features(x: Tensor, name: str) -> Tensor:
    """Return phi(x) over the last dim, float32 (float64 for float64)."""
    x = x.to(accumulator_dtype(x.dtype))
    return torch.softmax(x, dim=-1) if name == "softmax" else F.elu(x) + 1


def with_ones(v: Tensor) -> Tensor:
    """Return `[v, 1]`, float32 (float64 for float64): the last column of a sum is its denominator."""
    wide = v.to(accumulator_dtype(v.dtype))
    return torch.cat([wide, torch.ones_like(wide[..., :1])], dim=-1)


def left_out(picks: Tensor, *, block_size: int, positions: Tensor, first: Tensor) -> Tensor:
    """Return which queries have blocks of their document, before their own, that they did not pick: bool `[B, T, H]`.

    Args:
        picks: int64 `[B, T, H, S]`, of blocks before the own one; negative = none.
        positions: int64 `[T]`; first: int64 `[R, T]`, the first position of each query's document.
    """
    before = (
        positions // block_size - first // block_size
    )  # of a block that documents share, the last one's part counts
    return before[:, :, None] > (picks >= 0).sum(-1)


def rest_of(every: Tensor, selected: Tensor, some: Tensor) -> Tensor:
    """Return normalised linear attention to what is not selected; 0, and gradients of 0, where that is nothing.

    Nothing is also a denominator that is no more than the rounding of the sums it is the difference of: there the
    numerator is noise.

    Args:
        every, selected: `[B, T, H, Dv + 1]`, sums over all and over the selected, denominators last.
        some: bool `[B, T, H]`, whether anything is left out.
    """
    rest, limits = every - selected, torch.finfo(every.dtype)
    least = (every[..., -1:].detach() * (_NOISE * limits.eps)).clamp(min=limits.tiny)
    there = some[..., None] & (rest[..., -1:] > least)
    # Both are chosen before they are divided: a quotient that is thrown away would still have a gradient.
    return torch.where(there, rest[..., :-1], 0.0) / torch.where(there, rest[..., -1:], 1.0)
