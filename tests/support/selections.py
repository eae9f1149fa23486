"""Selections to test with, as functions of global positions: any rank makes its own queries' part of the same one."""

from dataclasses import replace

import torch
from torch import Tensor

from longctx.kernels.block_sparse.selection import Selection, selected_blocks

BLOCK = 4


def document_starts(bounds: tuple[int, ...]) -> Tensor:
    """Return the first position of each position's document, int64 `[total]`."""
    ends = torch.tensor(bounds[1:])
    return torch.repeat_interleave(torch.tensor(bounds[:-1]), torch.diff(torch.tensor(bounds))).to(ends.dtype)


def random_blocks(positions: Tensor, document_of: Tensor, *, heads: int, slots: int, seed: int = 0) -> Selection:
    """Select `slots - 1` random earlier blocks (some of which hold nothing of the query's document) and the own one.

    Args:
        positions: int64 `[T]`; document_of: int64 `[R, total]`.
    """
    rows, total = document_of.shape
    count = -(-total // BLOCK)
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(rows, total, heads, count, generator=generator)[:, positions]
    own = positions // BLOCK
    scores = scores.masked_fill(torch.arange(count) >= own[None, :, None, None], -1.0)
    values, chosen = scores.topk(min(slots - 1, count), dim=-1)
    blocks = torch.where(values < 0.3, -1, chosen)  # fewer here and there
    blocks = torch.cat([blocks, own[None, :, None, None].expand(rows, -1, heads, 1)], dim=-1)
    return selected_blocks(blocks, block_size=BLOCK, positions=positions, first=document_of[:, positions])


def random_classes(positions: Tensor, document_of: Tensor, *, heads: int, seed: int = 0) -> Selection:
    """Let queries see keys of three random classes, each within a reach of its own; some keys are seen by nobody."""
    rows, total = document_of.shape
    generator = torch.Generator().manual_seed(seed)
    key_class = torch.randint(-1, 4, (rows, total, heads), generator=generator, dtype=torch.int32)
    place = positions[None, :, None].expand(rows, -1, heads)
    first = document_of[:, positions, None].expand(rows, -1, heads)
    lo = torch.stack([first, torch.maximum(first, place - 7), torch.maximum(first, place - 3)], dim=-1)
    hi = torch.stack([place, place, place - 2], dim=-1)
    even = (positions % 2 == 0)[None, :, None, None]
    slot_class = torch.where(even, torch.arange(3).flip(0), torch.arange(3)).expand_as(lo).contiguous()
    return Selection(lo=lo, hi=hi, slot_class=slot_class, key_class=key_class, block_size=BLOCK)


def two_parts(positions: Tensor, document_of: Tensor, *, heads: int, beside_heads: int) -> Selection:
    """Let queries see their last 5 keys, and beside them, of all before, those of random classes."""
    place, first = positions[None, :, None, None], document_of[:, positions, None, None]
    begin = torch.maximum(first, place - 4)
    window = Selection(lo=begin.expand(-1, -1, heads, -1), hi=place.expand(len(first), -1, heads, -1), block_size=BLOCK)
    classes = random_classes(positions, document_of, heads=beside_heads)
    return replace(window, beside=replace(classes, hi=torch.minimum(classes.hi, begin - 1)))


def nothing(positions: Tensor, document_of: Tensor, *, heads: int) -> Selection:
    """Select nothing at all."""
    shape = len(document_of), len(positions), heads, 2
    lo = torch.ones(shape, dtype=torch.int64)
    return Selection(lo=lo, hi=lo - 1, block_size=BLOCK)
