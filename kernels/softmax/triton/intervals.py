"""From tiles to what each row sees: disjoint intervals of columns. Integers only, on the CPU.

A shard's tokens are in the order of their positions, so what a part of a mask shows to a query is one interval of the
keys of a shard, whatever layout and documents the tiles were cut by. Rows of different tiles, of stripes or of short
documents, can so share a block, which tiles by themselves could not.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longctx.kernels.positions import Tile


@dataclass(frozen=True)
class Intervals:
    """Row `row[n]` sees the columns from `begin[n]` up to, not including, `end[n]`; int64 `[N]`, by row and column.

    No two of a row overlap or touch. `layer[n]` counts a row's intervals from 0.
    """

    row: Tensor
    begin: Tensor
    end: Tensor
    layer: Tensor

    @property
    def layers(self) -> int:
        """Return the most intervals of any row."""
        return int(self.layer.max()) + 1 if len(self.layer) else 0

    def dense(self, rows: int) -> tuple[Tensor, Tensor]:
        """Return begins and ends as int32 `[layers, rows]`, 0 and 0 where a row has no such interval."""
        begins, ends = (torch.zeros(self.layers, rows, dtype=torch.int32) for _ in range(2))
        begins[self.layer, self.row] = self.begin.int()
        ends[self.layer, self.row] = self.end.int()
        return begins, ends


def intervals_of(tiles: Sequence[Tile]) -> Intervals:
    """Return what each query sees of the keys.

    Args:
        tiles: in which no pair of a query and a key is visible twice; without predicates.
    """
    assert all(tile.predicate is None for tile in tiles), "an interval has no predicate"
    fields = [(t.q_begin, t.q_count, t.k_begin, t.k_count, t.lo, t.hi) for t in tiles]
    first, count, left, width, lo, hi = torch.tensor(fields, dtype=torch.int64).view(-1, 6).unbind(1)
    tile = torch.repeat_interleave(count)
    place = torch.arange(len(tile)) - (count.cumsum(0) - count)[tile]
    row = first[tile] + place
    begin = left[tile] + (place + lo[tile]).clamp(min=0)
    end = left[tile] + torch.minimum(place + hi[tile] + 1, width[tile])
    seen = begin < end
    return _merged(row[seen], begin[seen], end[seen])


def transposed(intervals: Intervals, *, rows: int) -> Intervals:
    """Return which queries, of `rows`, see each key.

    A key's run of queries begins where a query sees it whose predecessor does not, and ends likewise: what neighbouring
    queries see apart from each other, which is as much as there is to return. (Expanding tiles by their columns instead
    would take T^2 / (2 width) for a striped causal shard.)
    """
    if not intervals.layers:
        return intervals
    none = int(intervals.end.max()) + 1
    begin, end = (torch.full((intervals.layers, rows + 2), none) for _ in range(2))
    begin[intervals.layer, intervals.row + 1] = intervals.begin
    end[intervals.layer, intervals.row + 1] = intervals.end
    # Row 0 here is before the first, the last one after the last: both see nothing.
    before, after = (begin[:, :-1], end[:, :-1]), (begin[:, 1:], end[:, 1:])
    column, first = _difference(after, before)
    same, stop = _difference(before, after)
    assert column.equal(same)
    place = torch.arange(len(column))
    new = torch.ones_like(column, dtype=torch.bool)
    new[1:] = column[1:] != column[:-1]
    return Intervals(column, first, stop, place - place[new][new.cumsum(0) - 1])


def _difference(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the columns that a row of `ours` sees and that of `theirs` does not, and which row: sorted by both."""
    (begin, end), (other_begin, other_end) = ours, theirs
    edge = torch.zeros_like(other_begin[:1])
    gaps = zip(torch.cat((edge, other_end)), torch.cat((other_begin, edge + torch.iinfo(edge.dtype).max)), strict=True)
    parts = [
        (torch.maximum(first, gap), torch.minimum(last, gap_end))
        for gap, gap_end in gaps
        for first, last in zip(begin, end, strict=True)
    ]
    first, last = (torch.cat(x) for x in zip(*parts, strict=True))
    row = torch.arange(begin.shape[1]).repeat(len(parts))
    count = (last - first).clamp(min=0)
    piece = torch.repeat_interleave(count)
    column = first[piece] + torch.arange(len(piece)) - (count.cumsum(0) - count)[piece]
    row = row[piece]
    order = (column * (begin.shape[1] + 1) + row).argsort()
    return column[order], row[order]


def _merged(row: Tensor, begin: Tensor, end: Tensor) -> Intervals:
    """Sort intervals and join those of a row that touch."""
    if len(row) == 0:
        return Intervals(row, begin, end, row)
    order = row * (int(end.max()) + 1) + begin
    if not bool((order[1:] > order[:-1]).all()):
        order = order.argsort()
        row, begin, end = row[order], begin[order], end[order]
    new_row = torch.ones_like(row, dtype=torch.bool)
    new_row[1:] = row[1:] != row[:-1]
    starts = new_row.clone()
    starts[1:] |= begin[1:] != end[:-1]
    ends = torch.ones_like(starts)
    ends[:-1] = starts[1:]
    row, begin, end, new_row = row[starts], begin[starts], end[ends], new_row[starts]
    place = torch.arange(len(row))
    return Intervals(row, begin, end, place - place[new_row][new_row.cumsum(0) - 1])
