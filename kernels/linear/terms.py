"""What one chunk makes of its tokens, apart from the state that enters it.

With G the running sum of the log decays in the chunk, a token's own included, and D_ij = exp(G_i - G_j) for j <= i:

    A_ij = D_ij q_i.k_j
    out  = A v + qe S      qe_i = exp(G_i) q_i
    S'   = M S + R         M = exp(G_C), R = sum_j exp(G_C - G_j) k_j v_j^T

With the delta rule values are what is left of them once the state has been read under their keys:

    L_ij = b_i D_ij k_i.k_j for j < i,   U = (1 + L)^-1 (b v),   W = (1 + L)^-1 (b exp(G) k)
    out  = A U + (exp(G) q - A W) S
    S'   = (diag exp(G_C) - Kt^T W) S + Kt^T U,   Kt_j = exp(G_C - G_j) k_j

the UT transform (arXiv 2406.06484) with gates (2412.06464, 2510.26692). Where documents meet in a chunk pairs of
different ones are masked by index, since decays cannot tell.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longctx.kernels.linear.decay import Decayed
from longctx.kernels.linear.sight import Sight


@dataclass(frozen=True, slots=True)
class Terms:
    """Of chunks `[B, N, H]`: out = scores values + queries S, S' = transition S + state.

    Attributes:
        scores: `[B, N, H, C, C]`, A.
        values: `[B, N, H, C, V]`, v or U.
        queries: `[B, N, H, C, K]`, what reads the state that enters.
        transition: `[B, N, H, ...]`, as in `Affine`.
        state: `[B, N, H, K, V]`, what leaves if nothing enters.
    """

    scores: Tensor
    values: Tensor
    queries: Tensor
    transition: Tensor
    state: Tensor


def terms(q: Tensor, k: Tensor, v: Tensor, *, decayed: Decayed, beta: Tensor | None, sight: Sight | None) -> Terms:
    """Return the terms of chunks.

    Args:
        q, k: `[B, N, H, C, K]`, float32 or float64.
        v: `[B, N, H, C, V]`.
        decayed: the products of q with k, with beta also those of k with k, and the decays.
        beta: None or `[B, N, H, C, 1]`.
        sight: where documents meet; None = all tokens are of one.
    """
    products, entering, leaving, across = decayed.products, [decayed.entering], [decayed.leaving], decayed.across
    if sight is not None:
        entering, leaving, across = [*entering, sight.entering], [*leaving, sight.leaving], across * sight.across
        products = [product * sight.pairs for product in products]
    transition = across.expand(*k.shape[:3], *across.shape[3:])
    queries, left = _times(q, entering), _times(k, leaving)
    if beta is None:
        return Terms(products[0], v, queries, transition, left.mT @ v)
    scores, keys = products
    wanted = torch.cat([beta * v, beta * _times(k, entering)], dim=-1)
    values, read = _Solve.apply(beta * keys, wanted).split([v.shape[-1], k.shape[-1]], dim=-1)
    decays = torch.diag_embed(transition[..., 0].expand(*k.shape[:3], k.shape[-1]))
    return Terms(scores, values, queries - scores @ read, decays - left.mT @ read, left.mT @ values)


def _times(x: Tensor, decays: list[Tensor | None]) -> Tensor:
    """Return x times those that there are."""
    for decay in decays:
        x = x if decay is None else x * decay
    return x


class _Solve(torch.autograd.Function):
    """(1 + L)^-1 X for the part L of a matrix below its diagonal; the inverse serves the backward too."""

    @staticmethod
    def forward(ctx: Any, lower: Tensor, x: Tensor) -> Tensor:
        """Take `[..., C, C]` and `[..., C, D]`."""
        one = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device).expand_as(lower)
        inverse = torch.linalg.solve_triangular(lower, one, upper=False, unitriangular=True)
        y = inverse @ x
        ctx.save_for_backward(inverse, y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        """Return -dX Y^T below the diagonal, and dX."""
        inverse, y = ctx.saved_tensors
        dx = inverse.mT @ grads[0]
        return (dx @ y.mT).neg_().tril_(-1), dx
