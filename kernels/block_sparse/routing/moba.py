"""Mixture of Block Attention's router (MoBA, arXiv 2502.13189): queries against the means of past blocks' keys."""

import torch
from torch import Tensor

from longctx.kernels.block_sparse.blocks import Blocks
from longctx.kernels.block_sparse.routing.topk import SCORES, Chunk, route, top_blocks


def moba_blocks(
    q: Tensor, means: Tensor, *, blocks: Blocks, positions: Tensor, first: Tensor, topk: int, scores: int = SCORES
) -> Tensor:
    """Return each query's own block, and of those before it the topk - 1 with the greatest `q . mean(k)`.

    The mean of a query's own block holds later keys, so that block is never scored: it is always selected. Where fewer
    blocks lie before, fewer are selected; with topk = 1 none is but the query's own.

    Args:
        q: `[B, T, H, D]`; positions: int64 `[T]`; first: int64 `[R, T]`.
        means: `[B, N, HK, D]`, of the keys of all blocks, float32 (float64).
        blocks: all blocks.

    Returns:
        int64 `[B, T, H, min(topk - 1, N) + 1]`, -1 = none; the own block is the last.
    """
    own = own_slots(positions, block_size=blocks.block_size, like=q)
    if topk == 1:
        return own

    def choose(scores: Tensor, chunk: Chunk) -> Tensor:
        allowed = chunk.past(blocks)  # [R, n, block, N]
        best = top_blocks(scores.masked_fill(~allowed[:, :, None, None], float("-inf")), topk - 1)
        return best.permute(0, 1, 4, 2, 3, 5).flatten(3, 4)

    best = route(q, means, block_size=blocks.block_size, positions=positions, first=first, choose=choose, scores=scores)
    return torch.cat([best, own], dim=-1)


def own_slots(positions: Tensor, *, block_size: int, like: Tensor) -> Tensor:
    """Return each query's own block, int64 `[B, T, HS, 1]`, for `like [B, T, HS, D]`."""
    own = positions // block_size
    return own[None, :, None, None].expand(like.shape[0], -1, like.shape[2], 1)
