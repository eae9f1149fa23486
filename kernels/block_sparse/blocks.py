"""Blocks of consecutive positions and their summaries, which is all that routing needs to know of keys.

Block n of `block_size` holds the positions `n block_size ... (n + 1) block_size - 1` of the packed sequence; the last
one may be short. Of a block that documents share, only what belongs to the document that goes on behind it can be
selected from afar: so one summary per block is enough, that of the document of its last token.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class Blocks:
    """Some blocks of a sequence, those of a rank or all of them, in the order of their positions.

    Attributes:
        index: int64 `[N]`, block numbers.
        begin: int64 `[R, N]`, the first position of each block that is summarised: that of the block, or where the
            document of its last token begins.
        end: int64 `[N]`, one past the last position.
        document: int64 `[R, N]`, the first position of the document of each block's last token: two tokens are of one
            document iff theirs are equal.
        block_size: tokens of a block.
    """

    index: Tensor
    begin: Tensor
    end: Tensor
    document: Tensor
    block_size: int

    @property
    def count(self) -> int:
        """Return N."""
        return len(self.index)


def blocks_of(index: Tensor, *, block_size: int, total: int, document_of: Tensor) -> Blocks:
    """Return the blocks with these numbers.

    Args:
        index: int64 `[N]`.
        total: tokens of the sequence.
        document_of: int64 `[R, total]`, the first position of each position's document.
    """
    start = index * block_size
    end = torch.clamp(start + block_size, max=total)
    document = document_of[:, end - 1]
    return Blocks(index=index, begin=torch.maximum(start, document), end=end, document=document, block_size=block_size)


def by_block(x: Tensor, block_size: int) -> Tensor:
    """Return `x [B, T, ...]` as `[B, N, block_size, ...]`, with zeros behind a last block that is short.

    T is that of whole blocks in the order of their positions, of which only the sequence's last one may be short.
    """
    short = -x.shape[1] % block_size
    if short:
        x = torch.cat([x, x.new_zeros(x.shape[0], short, *x.shape[2:])], dim=1)
    return x.unflatten(1, (-1, block_size))


def members(blocks: Blocks) -> Tensor:
    """Return which places of each block are summarised: bool `[R, N, block_size]`."""
    place = blocks.index[:, None] * blocks.block_size + torch.arange(blocks.block_size, device=blocks.index.device)
    return (place >= blocks.begin[:, :, None]) & (place < blocks.end[:, None])


def block_mean(x: Tensor, blocks: Blocks) -> Tensor:
    """Return the mean of each block's summarised tokens, float32 (float64 for float64): `[B, T, ...] -> [B, N, ...]`.

    Added up in float64 and rounded: in which order may depend on how many blocks a rank has, on a GPU for instance, and
    summaries must be the same bits on every rank. Differentiable.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    cut = by_block(x.to(torch.float64), blocks.block_size)  # [B, N, block, ...]
    inside = members(blocks).to(torch.float64)
    weight = (inside / inside.sum(-1, keepdim=True)).reshape(*inside.shape, *(1,) * (x.dim() - 2))
    return (cut * weight).sum(2).to(wide)


def past(blocks: Blocks, *, positions: Tensor, first: Tensor) -> Tensor:
    """Return which blocks lie before a query's own one and hold something of its document: bool `[R, T, N]`.

    Args:
        positions: int64 `[T]`, of the queries.
        first: int64 `[R, T]`, the first position of each query's document.
    """
    before = blocks.index[None, :] < (positions // blocks.block_size)[:, None]  # [T, N]
    return before[None] & (blocks.document[:, None, :] == first[:, :, None])
