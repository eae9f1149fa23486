"""Positions as arithmetic progressions, and the banded tiles between two of them. Integers only.

A rank's tokens are a few `Segment`s of global positions. Between two segments of equal stride every mask that looks at
`k_position - q_position` alone is a band `lo <= j - i <= hi` on local indices, so a layout is data and not code.
"""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from longctx.kernels.predicate import TilePredicate


@dataclass(frozen=True, slots=True)
class Segment:
    """An arithmetic progression of global positions: `start, start + stride, ...`, `count` of them."""

    start: int
    stride: int
    count: int

    def __post_init__(self) -> None:
        assert self.start >= 0 and self.stride >= 1 and self.count >= 1, self

    @property
    def last(self) -> int:
        """Return the last position (inclusive)."""
        return self.start + (self.count - 1) * self.stride

    def index_at_or_after(self, position: int) -> int:
        """Return the smallest local index whose position is `>= position`, clamped to `[0, count]`."""
        return min(max(-((self.start - position) // self.stride), 0), self.count)

    def part(self, begin: int, end: int) -> "Segment":
        """Return local indices `[begin, end)` as a segment."""
        return Segment(self.start + begin * self.stride, self.stride, end - begin)


@dataclass(frozen=True, slots=True)
class Piece:
    """A segment with its place in a shard: it holds local indices `[begin, begin + segment.count)`."""

    begin: int
    segment: Segment

    @property
    def end(self) -> int:
        return self.begin + self.segment.count


class Extent:
    """Rows and columns of a block of a shard's score matrix, as slices; for classes with these four fields."""

    __slots__ = ()
    q_begin: int
    q_count: int
    k_begin: int
    k_count: int

    @property
    def rows(self) -> slice:
        """Return the queries, in shard-local indices."""
        return slice(self.q_begin, self.q_begin + self.q_count)

    @property
    def columns(self) -> slice:
        """Return the keys, in shard-local indices."""
        return slice(self.k_begin, self.k_begin + self.k_count)


@dataclass(frozen=True, slots=True)
class Tile(Extent):
    """A q piece against a k piece, in shard-local indices, with a band.

    Row `i` (of `q_count`) sees column `j` (of `k_count`) iff `lo <= j - i <= hi`. Bounds are clamped to the tile, so a
    tile is full iff `lo == 1 - q_count` and `hi == k_count - 1`. A tile with nothing visible is never made.

    Of the band, `predicate` lets through some pairs only; None = all. A kernel that cannot evaluate it must refuse.
    """

    q_begin: int
    q_count: int
    k_begin: int
    k_count: int
    lo: int
    hi: int
    predicate: "TilePredicate | None" = None

    @property
    def full(self) -> bool:
        """Tell whether every row is known to see every column."""
        return self.predicate is None and self.lo <= 1 - self.q_count and self.hi >= self.k_count - 1

    @property
    def pairs(self) -> int:
        """Return the number of visible (row, column) pairs: the tile's work. A predicate is evaluated for it."""
        if self.predicate is not None:
            return self.predicate.count(lo=self.lo, hi=self.hi)
        return _pairs_at_most(self.q_count, self.k_count, self.hi) - _pairs_at_most(
            self.q_count, self.k_count, self.lo - 1
        )


def make_tile(q: Piece, k: Piece, *, lo: int, hi: int) -> Tile | None:
    """Return the tile of two pieces with the band clamped to it, or None when nothing is visible."""
    n, m = q.segment.count, k.segment.count
    lo, hi = max(lo, 1 - n), min(hi, m - 1)
    if lo > hi or hi < 1 - n or lo > m - 1:
        return None
    return Tile(q.begin, n, k.begin, m, lo, hi)


def total_pairs(tiles: Iterable[Tile]) -> int:
    """Return the visible pairs of a list of tiles."""
    return sum(tile.pairs for tile in tiles)


def _pairs_at_most(rows: int, columns: int, bound: int) -> int:
    """Count pairs with `j - i <= bound` in a `rows x columns` tile: sum over i of clamp(i + bound + 1, 0, columns)."""
    first = max(0, -bound)  # rows before it see nothing
    full = max(0, columns - 1 - bound)  # rows from it on see all columns
    if first >= rows:
        return 0
    ramp_end = min(max(full, first), rows)
    ramp = ramp_end - first
    ramp_sum = ramp * (first + bound + 1) + ramp * (ramp - 1) // 2
    return ramp_sum + (rows - ramp_end) * columns


def cut(segments: Sequence[Segment], bounds: Sequence[int]) -> list[list[Piece]]:
    """Cut a shard's segments at document bounds.

    Args:
        segments: the shard's segments, ascending, in local order.
        bounds: `cu_seqlens`, ascending, from 0 to the total length.

    Returns:
        For each document, its pieces in local order (maybe none). A document's pieces are adjacent in local indices.
    """
    documents: list[list[Piece]] = [[] for _ in range(len(bounds) - 1)]
    offset = 0
    for segment in segments:
        document = _document_of(segment.start, bounds)
        index = 0
        while index < segment.count:
            end = segment.index_at_or_after(bounds[document + 1])
            if end > index:
                documents[document].append(Piece(offset + index, segment.part(index, end)))
                index = end
            if index < segment.count:
                document = _document_of(segment.start + index * segment.stride, bounds)
        offset += segment.count
    return documents


def _document_of(position: int, bounds: Sequence[int]) -> int:
    document = bisect_right(bounds, position) - 1
    assert 0 <= document < len(bounds) - 1, (position, bounds)
    return document


def check_bounds(bounds: Sequence[int], *, total: int) -> None:
    """Refuse document bounds that do not go strictly upwards from 0 to `total`."""
    if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != total or any(b <= a for a, b in pairwise(bounds)):
        raise ValueError(
            f"cu_seqlens must go strictly upwards from 0 to {total} (the number of tokens); given {bounds}"
        )
