"""What one chunk makes of its tokens, apart from the state that enters it.

With G the running sum of the log decays inside of the chunk, its own token included, and D_ij = exp(G_i - G_j) for j <= i:

    A_ij = D_ij q_i.k_j
    out  = A v + qe S      qe_i = exp(G_i) q_i
    S'   = M S + R         M = exp(G_C), R = sum_j exp(G_C - G_j) k_j v_j^T

With the delta rule values are what is left of them once the state has been read under their keys:

    L_ij = b_i D_ij k_i.k_j for j < i,   U = (1 + L)^-1 (b v),   W = (1 + L)^-1 (b exp(G) k)
    out  = A U + (exp(G) q - A W) S
    S'   = (diag exp(G_C) - Kt^T W) S + Kt^T U,   Kt_j = exp(G_C - G_j) k_j

the UT transform (arXiv 2406.06484) with gates (2412.06464, 2510.26692). Only differences <= 0 are exponentiated. Where
documents meet in a chunk pairs of different ones are masked by index, since decays cannot tell.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from longctx.kernels.linear.chunks import Sight
from longctx.kernels.linear.decay import Decay


@dataclass(frozen=True, slots=True)
class Terms:
    """Of chunks `[B, N, H]`.

    Attributes:
        out: `[B, N, H, C, V]`, the outputs if nothing entered.
        queries: `[B, N, H, C, K]`, what reads the state that enters.
        transition: `[B, N, H, ...]`, as in `Affine`.
        state: `[B, N, H, K, V]`, what leaves if nothing entered.
    """

    out: Tensor
    queries: Tensor
    transition: Tensor
    state: Tensor


def terms(q: Tensor, k: Tensor, v: Tensor, *, decay: Decay, beta: Tensor | None, sight: Sight | None) -> Terms:
    """Return the terms of chunks.

    Args:
        q, k: `[B, N, H, C, K]`, float32 or float64, q scaled.
        v: `[B, N, H, C, V]`.
        beta: None or `[B, N, H, C, 1]`.
    """
    entering, leaving, transition = decay.entering, decay.leaving, decay.across
    if sight is not None:
        entering = torch.where(sight.entering, entering, 0.0)
        leaving = torch.where(sight.leaving, leaving, 0.0)
        transition = torch.where(sight.across, transition, 0.0)
    transition = transition.expand(*k.shape[:3], *transition.shape[3:])
    queries, left = q * entering, k * leaving
    if beta is None:
        (scores,) = decay.products(q, k=k)
        scores = _masked(scores, sight, diagonal=0)
        return Terms(scores @ v, queries, transition, left.mT @ v)
    scores, keys = decay.products(q, k, k=k)
    scores, keys = _masked(scores, sight, diagonal=0), beta * _masked(keys, sight, diagonal=-1)
    wanted = torch.cat([beta * v, beta * entering * k], dim=-1)
    values, read = torch.linalg.solve_triangular(keys, wanted, upper=False, unitriangular=True).split(
        [v.shape[-1], k.shape[-1]], dim=-1
    )
    diagonal = torch.diag_embed(transition[..., 0].expand(*k.shape[:3], k.shape[-1]))
    return Terms(scores @ values, queries - scores @ read, diagonal - left.mT @ read, left.mT @ values)


def _masked(scores: Tensor, sight: Sight | None, *, diagonal: int) -> Tensor:
    """Return the scores of tokens before a token, itself included (0) or not (-1), in its document."""
    scores = scores.tril(diagonal)
    return scores if sight is None else torch.where(sight.pairs, scores, 0.0)
