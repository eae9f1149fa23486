"""A learnt gate over blocks: SeerAttention (arXiv 2410.13276), in the form of SeerAttention-R (arXiv 2506.08889).

The first paper pools the queries of a block as well. That is for prefilling: a causal model's query would then be
routed by later tokens of its own block. Here, as in the second paper, each token's query has a gate of its own, and
only keys are pooled.
"""

import torch
from torch import Tensor

from longctx.kernels.block_sparse.blocks import Blocks, block_mean, by_block, members
from longctx.kernels.block_sparse.routing.moba import own_slots
from longctx.kernels.block_sparse.routing.topk import SCORES, Chunk, assembled, chunk_shape, chunks, route, top_blocks
from longctx.kernels.merge import accumulator_dtype
from longctx.kernels.precision import in_full_float32, without_autocast


def pooled(k: Tensor, blocks: Blocks) -> Tensor:
    """Return the greatest, the least and the mean key of each block's summarised tokens: `[B, T, HK, D]` to
    `[B, N, HK, 3 D]`, float32 (float64)."""
    cut = by_block(k.to(accumulator_dtype(k.dtype)), blocks.block_size)
    out = ~members(blocks)[..., None, None]
    most = cut.masked_fill(out, float("-inf")).amax(2)
    least = cut.masked_fill(out, float("inf")).amin(2)
    return torch.cat([most, least, block_mean(k, blocks)], dim=-1)


@without_autocast
@in_full_float32
def gate_keys(pools: Tensor, weight: Tensor) -> Tensor:
    """Return `[B, N, HK, 3 D] x [HK, 3 D, E] -> [B, N, HK, E]`, in the dtype of the pools.

    Of all blocks, on every rank: so everybody has the same bits of them.
    """
    return torch.einsum("bnhd,hde->bnhe", pools, weight.to(pools.dtype))


@without_autocast
@in_full_float32
def gate_queries(q: Tensor, weight: Tensor, *, block_size: int) -> Tensor:
    """Return one gate query for each KV head's group, concatenated: `[B, T, H, D] x [HK, G D, E] -> [B, T, HK, E]`.

    float32 (float64); block by block, so that the bits do not depend on what else a rank has.
    """
    kv_heads, width, size = weight.shape
    group = q.shape[2] // kv_heads
    nowhere = torch.zeros(1, q.shape[1], dtype=torch.int64, device=q.device)
    shape = chunk_shape(batch=q.shape[0], kv_heads=kv_heads, rows=block_size, keys=width + size)
    cut = chunks(q, kv_heads=kv_heads, block_size=block_size, positions=nowhere[0], first=nowhere, shape=shape)

    def gated(chunk: Chunk) -> Tensor:
        rows = chunk.q.transpose(3, 4).flatten(4)  # [B, n, h, block, G D]
        assert rows.shape[-1] == group * q.shape[-1] == width, (rows.shape, weight.shape)
        return torch.matmul(rows, weight[chunk.heads].to(rows.dtype)).permute(0, 1, 3, 2, 4)

    return assembled(((chunk, gated(chunk)) for chunk in cut), kv_heads=kv_heads)[:, : q.shape[1]]


def seer_blocks(
    q: Tensor,
    k: Tensor,
    *,
    blocks: Blocks,
    positions: Tensor,
    first: Tensor,
    topk: int,
    threshold: float | None = None,
    scores: int = SCORES,
) -> Tensor:
    """Return each query's own block, and of those before it the topk - 1 that its gate opens to most.

    Args:
        q: `[B, T, HK, E]`, gate queries; k: `[B, N, HK, E]`, gate keys of all blocks.
        positions: int64 `[T]`; first: int64 `[R, T]`.
        blocks: all blocks.
        threshold: drop blocks that get less of the softmax over past blocks; None = keep them.

    Returns:
        int64 `[B, T, HK, min(topk - 1, N) + 1]`, -1 = none; the own block is the last.
    """
    own = own_slots(positions, block_size=blocks.block_size, like=q)
    if topk == 1:
        return own

    def choose(scores: Tensor, chunk: Chunk) -> Tensor:
        logits = past_logits(scores, chunk.past(blocks), size=q.shape[-1])[:, :, :, 0]
        best = top_blocks(logits, topk - 1)
        if threshold is not None:
            weights = torch.softmax(logits, dim=-1).gather(-1, best.clamp(min=0))  # NaN where there is no past block
            best = torch.where(weights >= threshold, best, -1)
        return best.transpose(2, 3)

    best = route(q, k, block_size=blocks.block_size, positions=positions, first=first, choose=choose, scores=scores)
    return torch.cat([best, own], dim=-1)


def past_logits(scores: Tensor, past: Tensor, *, size: int) -> Tensor:
    """Return the gate's logits, -inf where a block is not past: `scores / sqrt(size)` of `[B, n, h, G, block, N]`."""
    return (scores * size**-0.5).masked_fill(~past[:, :, None, None], float("-inf"))
