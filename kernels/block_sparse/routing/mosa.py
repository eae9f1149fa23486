"""Which tokens a router keeps: for each head the best of every group (MoSA, arXiv 2505.00315).

The paper lets each head choose its T / sparsity best tokens of the whole sequence. A token that is worse than a later
one is then dropped because of it: the mask is causal, the *selection* is not. `chunk_selection` is the causal one:
groups are chunks, and what a chunk keeps is told to later chunks only, while inside of it every query sees all before.
"""

import torch
from torch import Tensor

from longctx.kernels.block_sparse.routing.steady import steady_scores
from longctx.kernels.block_sparse.selection import Selection
from longctx.kernels.merge import accumulator_dtype

_KEPT, _REST, _NOBODY = 1, 0, -1  # classes of keys


def router_scores(x: Tensor, weight: Tensor) -> Tensor:
    """Return what tokens are chosen by, W x for every head: `[B, T, HS]`, float32 (float64 for float64), no gradient.

    Args:
        x: `[B, T, dim]`.
        weight: `[HS, dim]`.
    """
    return steady_scores(x[:, :, None], weight[None])[:, :, 0].to(accumulator_dtype(x.dtype))


def kept(scores: Tensor, *, group: Tensor, quota: Tensor) -> Tensor:
    """Return which tokens are among the best of their group, for every head by itself; of equals the lowest positions.

    Sorts twice, stably, by score and by group: the same on every rank that is given the same bits.

    Args:
        scores: `[B, total, HS]`, of all positions.
        group: int64 `[R, total]`, the first position of each position's group; groups are consecutive positions.
        quota: int64 `[R, total]`, how many of its group are kept.

    Returns:
        bool `[B, total, HS]`.
    """
    starts = group[..., None].expand_as(scores)
    by_score = torch.argsort(scores, dim=1, descending=True, stable=True)
    by_group = torch.argsort(starts.gather(1, by_score), dim=1, stable=True)
    order = by_score.gather(1, by_group)  # groups one after the other, the best first
    place = torch.arange(scores.shape[1], device=scores.device)[None, :, None]
    rank = place - starts  # positions of a group and places in `order` are the same interval
    good = rank < quota[..., None]
    return torch.empty_like(good.expand_as(scores)).scatter_(1, order, good.expand_as(scores))


def chunk_selection(
    scores: Tensor,
    *,
    document_of: Tensor,
    positions: Tensor,
    first: Tensor,
    chunk: int,
    keep: int,
    block_size: int,
) -> Selection:
    """Let a query see the `keep` best tokens of every chunk before its own, and all before itself in its own.

    Chunks are of `chunk` tokens, counted from where a document begins. Whether a token is kept depends on tokens behind
    it, but only of its own chunk, whose queries see it in either case.

    Args:
        scores: `[B, total, HS]`, of all positions.
        document_of: int64 `[R, total]`, the first position of each position's document; first: `[R, T]`, the same of
            the queries at positions, int64 `[T]`.

    Returns:
        The selection, with two slots of which one is of the tokens that are kept.
    """
    batch, total, heads = scores.shape
    place = torch.arange(total, device=scores.device)
    group = _chunk_start(place, document_of, chunk)
    good = kept(scores, group=group, quota=torch.full_like(group, keep))
    begin = torch.stack([_chunk_start(positions, first, chunk), first.expand(len(first), -1)], dim=-1)  # rest, kept
    shape = (batch, len(positions), heads, 2)
    return Selection(
        lo=begin[:, :, None, :].expand(shape),
        hi=positions[None, :, None, None].expand(shape),
        slot_class=torch.tensor([_REST, _KEPT], device=scores.device).expand(shape),
        key_class=torch.where(good, _KEPT, _REST).to(torch.int32),
        block_size=block_size,
    )


def expert_selection(
    scores: Tensor, *, document_of: Tensor, positions: Tensor, first: Tensor, sparsity: int, block_size: int
) -> Selection:
    """Let the ceil(length / sparsity) best tokens of every document see those of them that are not after themselves.

    Not causal: what is kept depends on the whole document. Queries that are not kept see nothing. Arguments as those
    of `chunk_selection`.
    """
    batch, _, heads = scores.shape
    ones = torch.ones_like(document_of)
    length = torch.zeros_like(document_of).scatter_add_(1, document_of, ones).gather(1, document_of)
    good = kept(scores, group=document_of, quota=-(-length // sparsity))
    shape = (batch, len(positions), heads, 1)
    mine = good[:, positions, :, None]
    return Selection(
        lo=torch.where(mine, first[:, :, None, None], 1),
        hi=torch.where(mine, positions[None, :, None, None], 0),
        slot_class=torch.full((), _KEPT, device=scores.device).expand(shape),
        key_class=torch.where(good, _KEPT, _NOBODY).to(torch.int32),
        block_size=block_size,
    )


def _chunk_start(positions: Tensor, first: Tensor, chunk: int) -> Tensor:
    """Return the first position of each position's chunk, int64 `[R, T]`."""
    return first + (positions - first) // chunk * chunk
