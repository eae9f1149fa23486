"""Compressed keys of Native Sparse Attention and the blocks that they point at (NSA, arXiv 2502.11089).

All of it lies on the grid of cells, `stride` tokens each: compressed block c is the cells c ... c + size / stride - 1,
a block of selection `block_size / stride` cells, and what ranks exchange are cells' means.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from longctx.kernels.block_sparse.blocks import Blocks
from longctx.kernels.block_sparse.routing.topk import SCORES, Chunk, route, top_blocks


def compressed(means: Tensor, *, cells: Blocks, size: int) -> Tensor:
    """Return the mean of each compressed block's tokens that are of the document of its last token. Differentiable.

    The paper learns an MLP for it; the mean is flash-linear-attention's choice.

    Args:
        means: `[B, N, ...]`, of all cells, float32 (float64).
        size: tokens of a compressed block, a multiple of the cells' size.

    Returns:
        `[B, N, ...]`, one compressed block beginning at every cell. The last ones hang over the end: nobody sees them.
    """
    over = size // cells.block_size - 1
    count = F.pad(cells.end - cells.begin, (0, over))  # [R, N + over]
    document = F.pad(cells.document, (0, over), value=-1)
    of_last = document[:, over:]
    means = F.pad(means, (*(0, 0) * (means.dim() - 2), 0, over))
    counts = [
        count[:, cell : cell + cells.count] * (document[:, cell : cell + cells.count] == of_last)
        for cell in range(over + 1)
    ]
    total = torch.stack(counts).sum(0).clamp(min=1)
    shape = (*total.shape, *(1,) * (means.dim() - 2))
    weights = [(each.to(means.dtype) / total).view(shape) for each in counts]
    terms = [weight * means[:, cell : cell + cells.count] for cell, weight in enumerate(weights)]
    return torch.stack(terms).sum(0)


def compressed_seen(*, positions: Tensor, first: Tensor, stride: int, size: int) -> Tensor:
    """Return the compressed blocks that each query sees, from the first up to, not including, the last: `[R, ..., 2]`.

    Those of which no token is later than the query, that begin in its document or in the cell where that begins: the
    same ones, then, whatever is packed before a document that begins with a cell.

    Args:
        positions: int64 `[...]`; first: int64 `[R, ...]`.
    """
    begin = first // stride
    end = (positions + 1) // stride - size // stride + 1
    return torch.stack([begin, torch.maximum(begin, end)], dim=-1)


def importance(weights: Tensor, *, size: int, stride: int, block_size: int, blocks: int) -> Tensor:
    """Return the weight of compressed blocks in each block of selection, times the cells that they share (eq. 9).

    `sum over m < block_size / stride and n < size / stride of weights[block_size / stride block + m - n]`; the paper
    prints `- m - n`, which would count the cells before the block.

    Args:
        weights: `[..., N]`, of compressed blocks.

    Returns:
        `[..., blocks]`.
    """
    over, per_block = size // stride - 1, block_size // stride
    padded = F.pad(weights, (over, blocks * per_block - weights.shape[-1]))
    cells = padded[..., over:]
    for shift in range(1, over + 1):  # the compressed block that begins `shift` cells before
        cells = cells + padded[..., over - shift : padded.shape[-1] - shift]
    return cells.unflatten(-1, (blocks, per_block)).sum(-1)


def nsa_blocks(
    q: Tensor,
    keys: Tensor,
    *,
    blocks: Blocks,
    positions: Tensor,
    first: Tensor,
    stride: int,
    size: int,
    select: int,
    local: int,
    softcap: float | None = None,
    scores: int = SCORES,
) -> Tensor:
    """Return the `select` blocks of each query that compressed attention finds most important, summed over its group.

    The first block of the document, the query's own and the `local - 1` before it are always among them.

    Args:
        q: `[B, T, H, D]`; positions: int64 `[T]`; first: int64 `[R, T]`.
        keys: `[B, N, HK, D]`, compressed.
        blocks: all blocks of selection.
        softcap: of the scores of compressed attention.

    Returns:
        int64 `[B, T, HK, min(select, blocks)]`, -1 = none.
    """
    block_size = blocks.block_size
    scale = q.shape[-1] ** -0.5
    index = torch.arange(keys.shape[1], device=q.device)

    def choose(scores: Tensor, chunk: Chunk) -> Tensor:
        seen = compressed_seen(positions=chunk.positions, first=chunk.first, stride=stride, size=size)
        visible = (index >= seen[..., :1]) & (index < seen[..., 1:])  # [R, n, block, N]
        blind = ~visible.any(-1)[:, :, None, None, :, None]
        logits = scores * scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        logits = logits.masked_fill_(~visible[:, :, None, None], float("-inf"))
        weights = torch.softmax(logits, dim=-1).masked_fill_(blind, 0.0).sum(3)  # [B, n, h, block, N]
        of_group = importance(weights, size=size, stride=stride, block_size=block_size, blocks=blocks.count)
        past = chunk.past(blocks)  # [R, n, block, blocks]
        own = (chunk.positions // block_size)[..., None]
        beginning = blocks.index == (chunk.first // block_size)[..., None]
        near = (blocks.index > own - local) & (blocks.index <= own)
        here = past | (blocks.index == own)
        value = of_group.masked_fill((here & (beginning | near))[:, :, None], float("inf"))
        best = top_blocks(value.masked_fill(~here[:, :, None], float("-inf")), select)
        return best.transpose(2, 3)

    return route(q, keys, block_size=block_size, positions=positions, first=first, choose=choose, scores=scores)
