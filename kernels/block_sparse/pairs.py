"""From intervals to pairs of a query and a tile of keys, and to tiles of queries that visit the same tile of keys.

A tile of keys is `width` keys of a lane. A query that sees something of it is a pair; the pairs of a tile of keys are
gathered, some of them at a time, so that what is computed is matrix products whose number is proportional to what is
selected. Pairs that see a whole tile come first: only the others need a mask.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from longctx.kernels.block_sparse.lanes import Lanes


@dataclass(frozen=True, eq=False, kw_only=True)
class Pairs:
    """The pairs of some queries, in the order of full ones, then of tiles of keys; P of them in NG groups.

    Attributes:
        rows: int64 `[N]`, the queries, as numbers of `(b, t, hs)`.
        begin: int64 `[N + 1]`: the pairs of query n are those with the numbers `begin[n]` to `begin[n + 1] - 1`.
        place: int64 `[P]`, where a pair's query is in `rows`.
        number: int64 `[P]`, counts pairs by queries: results that lie so can be summed query by query.
        slot: int64 `[P]`, the slot that a pair belongs to.
        lo, hi: int64 `[P]`: columns `[lo, hi)` of the tile are seen.
        groups: int64 `[NG]`, the tile of keys of each group: `lane * tiles per lane + tile`, ascending but that
            those of full pairs come first.
        bounds: int64 `[NG + 1]`: the pairs of group i are those from `bounds[i]` to `bounds[i + 1] - 1`.
        full: how many groups, the first ones, see whole tiles of keys.
    """

    rows: Tensor
    begin: Tensor
    place: Tensor
    number: Tensor
    slot: Tensor
    lo: Tensor
    hi: Tensor
    groups: Tensor
    bounds: Tensor
    full: int

    @property
    def count(self) -> int:
        """Return P."""
        return len(self.place)


@dataclass(frozen=True, eq=False, kw_only=True)
class Pieces:
    """Groups cut into pieces of not too many rows; N2 of them, in the order of the groups.

    A pair has as many rows as heads share its query: row `pair * heads + head`.

    Attributes:
        tiles: int64 `[N2]`, the tile of keys of each piece.
        begin, end: int64 `[N2]`: its rows are those from `begin` to `end - 1`.
        first: int64 `[NG + 1]`: the pieces of group i are those from `first[i]` to `first[i + 1] - 1`.
        full: how many pieces, the first ones, see whole tiles of keys.
    """

    tiles: Tensor
    begin: Tensor
    end: Tensor
    first: Tensor
    full: int


def pieces_of(pairs: Pairs, most: int, *, heads: int = 1) -> Pieces:
    """Cut groups into pieces of at most `most` rows."""
    bounds = pairs.bounds * heads
    first = _begins(-(-bounds.diff() // most))
    full, count = first[[pairs.full, -1]].tolist()
    number = torch.arange(count, device=bounds.device)
    group = torch.searchsorted(first, number, right=True) - 1
    begin = bounds[group] + (number - first[group]) * most
    end = torch.minimum(begin + most, bounds[group + 1])
    return Pieces(tiles=pairs.groups[group], begin=begin, end=end, first=first, full=full)


def pairs_of(
    lanes: Lanes, *, batch: int, kv_heads: int, width: int, tiles_per_lane: int, at_once: int
) -> Iterator[Pairs]:
    """Yield all pairs, some queries at a time: whole lanes where they are few, else runs of a lane's queries.

    Args:
        batch: B.
        kv_heads: HK.
        width: keys of a tile.
        tiles_per_lane: tiles that a lane is cut into.
        at_once: how many pairs, about.
    """
    heads, tokens, device = lanes.begin.shape[2], lanes.begin.shape[1], lanes.begin.device
    begin, end = (x.permute(0, 2, 1, 3).expand(batch, -1, -1, -1).flatten(0, 2) for x in (lanes.begin, lanes.end))
    counts = torch.where(end > begin, (end - 1) // width - begin // width + 1, 0).sum(-1)  # [B HS T]
    for first, last in _chunks(counts, at_once):
        lane_of = torch.arange(first, last, device=device)
        row, head, token = lane_of // (heads * tokens), lane_of // tokens % heads, lane_of % tokens
        lane = row * heads + head if lanes.per_head else row * kv_heads + head * kv_heads // heads
        rows = (row * tokens + token) * heads + head
        yield _pairs(rows, lane, begin[first:last], end[first:last], width, tiles_per_lane)


def _chunks(counts: Tensor, at_once: int) -> list[tuple[int, int]]:
    """Cut queries into runs of about `at_once` pairs, leaving out runs without any."""
    sums = counts.cumsum(0)
    total = int(sums[-1]) if len(sums) else 0
    if total == 0:
        return []
    pieces = -(-total // at_once)
    goals = torch.arange(1, pieces, device=counts.device) * total // pieces
    cuts = [0, *(torch.searchsorted(sums, goals) + 1).tolist(), len(counts)]
    return [(a, b) for a, b in pairwise(cuts) if a < b]


def _pairs(rows: Tensor, lane: Tensor, begin: Tensor, end: Tensor, width: int, tiles_per_lane: int) -> Pairs:
    device = rows.device
    first = begin // width
    count = torch.where(end > begin, (end - 1) // width - first + 1, 0)
    before = _begins(count.flatten())  # of [N, S]
    entry = torch.repeat_interleave(torch.arange(count.numel(), device=device), count.flatten())
    nth = torch.arange(len(entry), device=device) - before[entry]
    place, slot = entry // count.shape[1], entry % count.shape[1]
    tile = first.flatten()[entry] + nth
    lo = (begin.flatten()[entry] - tile * width).clamp(min=0)
    hi = (end.flatten()[entry] - tile * width).clamp(max=width)
    partial = (lo > 0) | (hi < width)
    key = lane[place] * tiles_per_lane + tile
    span = int(key.max()) + 1 if len(key) else 1
    order = torch.argsort(key + partial * span, stable=True)
    groups, sizes = torch.unique_consecutive((key + partial * span)[order], return_counts=True)
    return Pairs(
        rows=rows,
        begin=before[:: count.shape[1]].contiguous(),
        place=place[order],
        number=order,
        slot=slot[order],
        lo=lo[order],
        hi=hi[order],
        groups=groups % span,
        bounds=_begins(sizes),
        full=int((groups < span).sum()),
    )


def _begins(sizes: Tensor) -> Tensor:
    """Return where parts of these sizes begin, `[N]`, and the end: int64 `[N + 1]`."""
    return torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
