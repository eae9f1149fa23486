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


def intervals_of(tiles: Sequence[Tile], *, transposed: bool = False) -> Intervals:
    """Return what each query sees of the keys, or `transposed` which queries see each key.

    Args:
        tiles: in which no pair of a query and a key is visible twice; without predicates.
    """
    assert all(tile.predicate is None for tile in tiles), "an interval has no predicate"
    fields = [(t.q_begin, t.q_count, t.k_begin, t.k_count, t.lo, t.hi) for t in tiles]
    table = torch.tensor(fields, dtype=torch.int64).view(-1, 6)
    first, count, left, width, lo, hi = table.unbind(1)
    if transposed:
        first, count, left, width, lo, hi = left, width, first, count, -hi, -lo
    tile = torch.repeat_interleave(count)
    place = torch.arange(len(tile)) - (count.cumsum(0) - count)[tile]
    row = first[tile] + place
    begin = left[tile] + (place + lo[tile]).clamp(min=0)
    end = left[tile] + torch.minimum(place + hi[tile] + 1, width[tile])
    seen = begin < end
    return _merged(row[seen], begin[seen], end[seen])


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
