"""Merge two partial results of softmax attention over disjoint sets of keys.

For one query, a set of keys S gives `lse(S) = log sum_{j in S} exp(s_j)` and `out(S) = sum_{j in S} exp(s_j - lse(S))
v_j`. Over disjoint sets, with `lse = logaddexp(lse_a, lse_b)`,

    out = exp(lse_a - lse) out_a + exp(lse_b - lse) out_b

This is associative and commutative with identity `(0, -inf)` (the online softmax of Milakov and Gimelshein,
arXiv 1805.02867, on normalised partials). Nothing here exponentiates a positive number, and two identities give the
identity: no overflow for any gap between the two lse, no NaN from `-inf - -inf`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(slots=True)
class Partial:
    """A normalised attention result over the keys seen so far.

    Attributes:
        out: `[B, T, H, Dv]`, float32 (float64 for float64 inputs).
        lse: `[B, H, T]`, same dtype, natural log; -inf for a query that has seen no key.
    """

    out: Tensor
    lse: Tensor


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of everything that is merged across tiles and hops: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def empty_partial(q: Tensor, *, v_head_dim: int) -> Partial:
    """Return the identity of the merge for queries `q [B, T, H, D]`."""
    batch, tokens, heads, _ = q.shape
    dtype = accumulator_dtype(q.dtype)
    out = torch.zeros(batch, tokens, heads, v_head_dim, dtype=dtype, device=q.device)
    lse = torch.full((batch, heads, tokens), float("-inf"), dtype=dtype, device=q.device)
    return Partial(out, lse)


def merge_into(partial: Partial, out: Tensor, lse: Tensor) -> None:
    """Merge `out [B, T, H, Dv]` and `lse [B, H, T]` (any float dtype) into `partial`, in place."""
    lse = lse.to(partial.lse.dtype)
    total = torch.logaddexp(partial.lse, lse)
    # The newcomer's share of the softmax mass, in [0, 1]; 0 where neither side has seen a key.
    weight = torch.exp(lse - total).masked_fill_(torch.isneginf(total), 0.0)
    partial.out.lerp_(out.to(partial.out.dtype), weight.transpose(1, 2).unsqueeze(-1))
    partial.lse.copy_(total)


def merge(a: Partial, b: Partial) -> Partial:
    """Return the merge of two partial results without changing either."""
    result = Partial(a.out.clone(), a.lse.clone())
    merge_into(result, b.out, b.lse)
    return result
