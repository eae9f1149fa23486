"""Scores that come out the same however a rank's tokens are cut, for layouts that keep no blocks together.

A matrix product adds up in an order that depends on its shape, and on which row of it a token is (edges of tiles). One
unit in the last place of float32 is enough for ranks to select other tokens than one rank would. In float64 what
remains is a billionth of that unit: whether it is rounded to float32 or compared, it all but never decides.
"""

import torch
from torch import Tensor

from longctx.kernels.precision import without_autocast

AT_ONCE = 1 << 22  # numbers of x that are widened at a time


@torch.no_grad()
@without_autocast
def steady_scores(x: Tensor, weight: Tensor) -> Tensor:
    """Return `x . weight` for every head, computed in float64: `[B, T, HS, C]`, float64.

    Args:
        x: `[B, T, HS, D]`.
        weight: `[HS, C, D]`.
    """
    batch, tokens, heads, size = x.shape
    scores = torch.empty(batch, tokens, heads, weight.shape[1], dtype=torch.float64, device=x.device)
    wide, step = weight.to(torch.float64), max(1, AT_ONCE // (batch * heads * size))
    for begin in range(0, tokens, step):
        rows = slice(begin, begin + step)
        scores[:, rows] = torch.einsum("bthd,hcd->bthc", x[:, rows].to(torch.float64), wide)
    return scores
