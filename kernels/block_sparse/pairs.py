"""From intervals to pairs of a query and a tile of keys, and to tiles of queries that visit the same tile of keys.

A tile of keys is `width` keys of a lane. A query that sees something of it is a pair; the pairs of a tile of keys are
gathered, `height` of them at a time, so that what is computed is matrix products whose number is proportional to what
is selected. Pairs that see a whole tile come first: only the others need a mask.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from longctx.kernels.block_sparse.lanes import Lanes

PAIRS_AT_ONCE = 1 << 18  # times the head dim, these are the partial results that exist at a time
HEIGHTS = (8, 16, 32, 64, 128, 256)


@dataclass(frozen=True, eq=False, kw_only=True)
class Pairs:
    """The pairs of some queries, in the order of full ones, then of tiles of keys; P of them.

    Attributes:
        rows: int64 `[N]`, the queries, as numbers of `(b, t, hs)`.
        place: int64 `[P]`, where a pair's query is in `rows`.
        turn: int64 `[P]`, 0, 1, ... counts the pairs of a query.
        turns: the most pairs of a query.
        slot: int64 `[P]`, the slot that a pair belongs to.
        lo, hi: int64 `[P]`: columns `[lo, hi)` of the tile are seen.
        tiles: int64 `[N2]`, the tile of keys of each tile of queries: `lane * tiles per lane + tile`.
        members: int64 `[N2, height]`, the pairs of each tile of queries, -1 where there are fewer.
        full: how many tiles of queries, the first ones, see whole tiles of keys.
    """

    rows: Tensor
    place: Tensor
    turn: Tensor
    turns: int
    slot: Tensor
    lo: Tensor
    hi: Tensor
    tiles: Tensor
    members: Tensor
    full: int


def pairs_of(lanes: Lanes, *, batch: int, kv_heads: int, width: int, tiles_per_lane: int) -> Iterator[Pairs]:
    """Yield all pairs, some queries at a time: whole lanes where they are few, else runs of a lane's queries.

    Args:
        batch: B.
        kv_heads: HK.
        width: keys of a tile.
        tiles_per_lane: tiles that a lane is cut into.
    """
    heads, tokens, device = lanes.begin.shape[2], lanes.begin.shape[1], lanes.begin.device
    begin, end = (x.permute(0, 2, 1, 3).expand(batch, -1, -1, -1).flatten(0, 2) for x in (lanes.begin, lanes.end))
    counts = torch.where(end > begin, (end - 1) // width - begin // width + 1, 0).sum(-1)  # [B HS T]
    for first, last in _chunks(counts):
        lane_of = torch.arange(first, last, device=device)
        row, head, token = lane_of // (heads * tokens), lane_of // tokens % heads, lane_of % tokens
        lane = row * heads + head if lanes.per_head else row * kv_heads + head * kv_heads // heads
        rows = (row * tokens + token) * heads + head
        yield _pairs(rows, lane, begin[first:last], end[first:last], width, tiles_per_lane)


def _chunks(counts: Tensor) -> list[tuple[int, int]]:
    """Cut queries into runs of about `PAIRS_AT_ONCE` pairs, leaving out runs without any."""
    sums = counts.cumsum(0)
    total = int(sums[-1]) if len(sums) else 0
    if total == 0:
        return []
    pieces = -(-total // PAIRS_AT_ONCE)
    goals = torch.arange(1, pieces, device=counts.device) * total // pieces
    cuts = [0, *(torch.searchsorted(sums, goals) + 1).tolist(), len(counts)]
    return [(a, b) for a, b in zip(cuts, cuts[1:], strict=False) if a < b]


def _pairs(rows: Tensor, lane: Tensor, begin: Tensor, end: Tensor, width: int, tiles_per_lane: int) -> Pairs:
    device = rows.device
    first = begin // width
    count = torch.where(end > begin, (end - 1) // width - first + 1, 0)
    entry = torch.repeat_interleave(torch.arange(count.numel(), device=device), count.flatten())  # of [N, S]
    nth = torch.arange(len(entry), device=device) - (count.flatten().cumsum(0) - count.flatten())[entry]
    place, slot = entry // count.shape[1], entry % count.shape[1]
    tile = first.flatten()[entry] + nth
    lo = (begin.flatten()[entry] - tile * width).clamp(min=0)
    hi = (end.flatten()[entry] - tile * width).clamp(max=width)
    per_row = count.sum(-1)
    turn = torch.arange(len(entry), device=device) - (per_row.cumsum(0) - per_row)[place]
    partial = (lo > 0) | (hi < width)
    key = lane[place] * tiles_per_lane + tile
    span = int(key.max()) + 1 if len(key) else 1
    order = torch.argsort(key + partial * span, stable=True)
    key, partial = key[order], partial[order]
    groups, sizes = torch.unique_consecutive(key + partial * span, return_counts=True)
    height = _height(len(key), len(groups))
    per_group = -(-sizes // height)
    start = per_group.cumsum(0) - per_group  # the first tile of queries of each group
    group = torch.repeat_interleave(torch.arange(len(groups), device=device), sizes)
    within = torch.arange(len(key), device=device) - (sizes.cumsum(0) - sizes)[group]
    members = torch.full((int(per_group.sum()), height), -1, dtype=torch.int64, device=device)
    members[start[group] + within // height, within % height] = torch.arange(len(key), device=device)
    tiles = torch.repeat_interleave(groups, per_group)
    return Pairs(
        rows=rows,
        place=place[order],
        turn=turn[order],
        turns=int(per_row.max()) if len(per_row) else 0,
        slot=slot[order],
        lo=lo[order],
        hi=hi[order],
        tiles=tiles % span,
        members=members,
        full=int((tiles < span).sum()),
    )


def _height(pairs: int, groups: int) -> int:
    """Return a height of which most groups fill several tiles, so that little of them is empty."""
    mean = pairs / max(groups, 1)
    return max((height for height in HEIGHTS if 2 * height <= mean), default=HEIGHTS[0])
