"""From two shards and a mask to the banded tiles between them, and to what of either shard takes part at all."""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence

import torch
from torch import Tensor

from longctx.kernels.mask import Mask
from longctx.kernels.mask_parts import Part
from longctx.kernels.positions import Piece, Segment, Tile, make_tile
from longctx.kernels.predicate import Predicate, TilePredicate, band

EXACT_HULL_PAIRS = 16
Range = tuple[int, int]


def tiles_between(
    q_documents: Sequence[Sequence[Piece]], k_documents: Sequence[Sequence[Piece]], *, mask: Mask, total: int
) -> tuple[Tile, ...]:
    """Return tiles that hold every pair of a query of one shard and a key of another that the mask lets through, once.

    Costs O(q pieces x log(k pieces)) for each part of the mask: the k pieces that a q piece sees completely are one
    tile, since a block's pieces are adjacent in a shard. With predicates every pair is evaluated: no tile is empty.
    A tile may hold rows or columns that see nothing; `hull` need not.

    Args:
        q_documents: the queries' shard, cut at the mask's blocks: `positions.cut(segments, mask.bounds(total))`.
        k_documents: the keys' shard, likewise, of the same stride.
        mask: who may see whom, in global positions.
        total: the number of tokens of the sequence.
    """
    limits = mask.limits(total)
    tiles: list[Tile] = []
    for block, (q_pieces, k_pieces) in enumerate(zip(q_documents, k_documents, strict=True)):
        if not q_pieces or not k_pieces:
            continue
        for part, limit in zip(mask.parts, limits, strict=True):
            seen = k_pieces if limit is None else _before(k_pieces, limit[block])
            if mask.predicates:
                tiles.extend(_evaluated(q_pieces, seen, part, mask.predicates))
            elif len(seen) == 1:
                tiles.extend(tile for q in q_pieces if (tile := _banded(q, seen[0], part)) is not None)
            elif seen:
                starts = [piece.segment.start for piece in seen]
                lasts = [piece.segment.last for piece in seen]
                for q in q_pieces:
                    tiles.extend(_row_of_tiles(q, seen, starts, lasts, part))
    return tuple(tiles)


def visible(tile: Tile, *, device: torch.device | str) -> Tensor:
    """Return which pairs of a tile see each other, band and predicates: bool `[q_count, k_count]`."""
    seen = band(tile.q_count, tile.k_count, lo=tile.lo, hi=tile.hi, device=device)
    return seen if tile.predicate is None else seen & tile.predicate.visible(device=device)


def _before(pieces: Sequence[Piece], limit: int) -> Sequence[Piece]:
    """Return the pieces up to, not including, position `limit`."""
    if pieces[-1].segment.last < limit:
        return pieces
    kept = []
    for piece in pieces:
        count = piece.segment.index_at_or_after(limit)
        if count:
            kept.append(piece if count == piece.segment.count else Piece(piece.begin, piece.segment.part(0, count)))
        if count < piece.segment.count:
            break
    return kept


def _row_of_tiles(
    q: Piece, k_pieces: Sequence[Piece], starts: Sequence[int], lasts: Sequence[int], part: Part
) -> list[Tile]:
    first, last = q.segment.start, q.segment.last
    # k pieces [seen_begin, seen_end) are seen by some query, [full_begin, full_end) entirely by all of them.
    seen_begin, full_begin = 0, 0
    seen_end, full_end = len(k_pieces), len(k_pieces)
    if part.least is not None:
        seen_begin = bisect_left(lasts, first + part.least)
        full_begin = bisect_left(starts, last + part.least)
    if part.most is not None:
        seen_end = bisect_right(starts, last + part.most)
        full_end = bisect_right(lasts, first + part.most)
    if full_begin >= full_end:
        full_begin = full_end = seen_end
    tiles = [_banded(q, k, part) for k in k_pieces[seen_begin:full_begin]]
    if full_begin < full_end:
        begin, end = k_pieces[full_begin].begin, k_pieces[full_end - 1].end
        n, m = q.segment.count, end - begin
        tiles.append(Tile(q.begin, n, begin, m, 1 - n, m - 1))
    tiles.extend(_banded(q, k, part) for k in k_pieces[full_end:seen_end])
    return [tile for tile in tiles if tile is not None]


def _evaluated(
    q_pieces: Sequence[Piece], k_pieces: Sequence[Piece], part: Part, functions: tuple[Predicate, ...]
) -> list[Tile]:
    """Return the tiles of a part under predicates: one per pair of pieces, whose positions it carries."""
    tiles = []
    for q in q_pieces:
        for k in k_pieces:
            inside = _banded(q, k, part)
            if inside is None:
                continue
            tile = Tile(
                *(inside.q_begin, inside.q_count, inside.k_begin, inside.k_count, inside.lo, inside.hi),
                TilePredicate(functions, q.segment, k.segment),
            )
            if tile.pairs:
                tiles.append(tile)
    return tiles


def _banded(q: Piece, k: Piece, part: Part) -> Tile | None:
    lo, hi = _index_band(q.segment, k.segment, part)
    return make_tile(q, k, lo=lo, hi=hi)


def _index_band(a: Segment, b: Segment, part: Part) -> Range:
    """Return `lo, hi` such that query `i` of `a` sees key `j` of `b` iff `lo <= j - i <= hi`."""
    assert a.stride == b.stride or a.count == 1 or b.count == 1, (a, b)
    stride = b.stride if a.count == 1 else a.stride
    offset = a.start - b.start
    # least <= b.start + j*stride - a.start - i*stride <= most  <=>  lo <= j - i <= hi
    lo = 1 - a.count if part.least is None else -(-(part.least + offset) // stride)
    hi = b.count - 1 if part.most is None else (offset + part.most) // stride
    return lo, hi


def hull(
    q_segments: Sequence[Segment], k_segments: Sequence[Segment], *, mask: Mask, total: int
) -> tuple[Range, Range] | None:
    """Return the local ranges `(q_begin, q_end), (k_begin, k_end)` outside of which no query sees and no key is seen.

    What a schedule has to move, without making any tile: microseconds per pair of segments. Exact between two single
    segments of stride 1 for causal, window and document masks; a superset otherwise (predicates count as letting
    everything through). Shards of many stripes are compared stripe by stripe without documents: striping spreads every
    document over all ranks, unless it is shorter than a stripe.

    Args:
        q_segments: the queries' shard, ascending.
        k_segments: the keys' shard, ascending, of the same stride.
        mask: who may see whom, in global positions.
        total: the number of tokens of the sequence.

    Returns:
        The two ranges, neither empty; None when certainly nothing is visible.
    """
    if len(q_segments) * len(k_segments) > EXACT_HULL_PAIRS:
        return _stripes_hull(q_segments, k_segments, mask=mask, total=total)
    boxes: list[tuple[int, int, int, int]] = []
    q_offset = 0
    for q in q_segments:
        k_offset = 0
        for k in k_segments:
            for q_begin, q_end, k_begin, k_end in _boxes(q, k, mask=mask, total=total):
                boxes.append((q_offset + q_begin, q_offset + q_end, k_offset + k_begin, k_offset + k_end))
            k_offset += k.count
        q_offset += q.count
    if not boxes:
        return None
    q_begins, q_ends, k_begins, k_ends = zip(*boxes, strict=True)
    return (min(q_begins), max(q_ends)), (min(k_begins), max(k_ends))


def _boxes(q: Segment, k: Segment, *, mask: Mask, total: int) -> list[tuple[int, int, int, int]]:
    """Return, for each part that has any, the local rows and columns in which it lets something through."""
    bounds = mask.bounds(total)
    # A pair is in one block, which both segments reach into.
    first = bisect_right(bounds, max(q.start, k.start)) - 1
    last = bisect_right(bounds, min(q.last, k.last)) - 1
    if first > last:
        return []
    begin, end = bounds[first], bounds[last + 1]
    q_begin, q_end = q.index_at_or_after(begin), q.index_at_or_after(end)
    k_begin, k_stop = k.index_at_or_after(begin), k.index_at_or_after(end)
    found = []
    for part, limit in zip(mask.parts, mask.limits(total), strict=True):
        # The last block's limit is after its document's start, so after what is visible in earlier documents.
        k_end = k_stop if limit is None else min(k_stop, k.index_at_or_after(limit[last]))
        if q_begin >= q_end or k_begin >= k_end:
            continue
        lo, hi = _index_band(q, k, part)
        if lo > hi:
            continue
        rows = max(q_begin, k_begin - hi), min(q_end, k_end - lo)
        columns = max(k_begin, q_begin + lo), min(k_end, q_end + hi)
        if rows[0] < rows[1] and columns[0] < columns[1]:
            found.append((*rows, *columns))
    return found


def _stripes_hull(
    q_segments: Sequence[Segment], k_segments: Sequence[Segment], *, mask: Mask, total: int
) -> tuple[Range, Range] | None:
    """Return the hull in whole segments: from the first that reaches some segment of the other shard to the last."""
    rows: list[Range] = []
    columns: list[Range] = []
    for part, limit in zip(mask.parts, mask.limits(total), strict=True):
        least = -total if part.least is None else part.least
        most = total if part.most is None else part.most
        end = total if limit is None else max(limit)
        keys = k_segments if end >= total else k_segments[: bisect_left(k_segments, end, key=_start)]
        q_range = _reaching(q_segments, keys, least=least, most=most)
        k_range = _reaching(keys, q_segments, least=-most, most=-least)
        if q_range and k_range:
            rows.append(q_range)
            columns.append(k_range)
    if not rows:
        return None
    return _around(rows), _around(columns)


def _reaching(segments: Sequence[Segment], others: Sequence[Segment], *, least: int, most: int) -> Range | None:
    """Return the local range from the first to the last segment with one of `others` at `least` to `most` from it."""

    def reaches(index: int) -> bool:
        segment = segments[index]
        nearest = bisect_left(others, segment.start + least, key=_last)
        return nearest < len(others) and others[nearest].start <= segment.last + most

    first = next((index for index in range(len(segments)) if reaches(index)), None)
    if first is None:
        return None
    last = next(index for index in reversed(range(len(segments))) if reaches(index))
    begin = sum(segment.count for segment in segments[:first])
    return begin, begin + sum(segment.count for segment in segments[first : last + 1])


def _start(segment: Segment) -> int:
    return segment.start


def _last(segment: Segment) -> int:
    return segment.last


def _around(ranges: Sequence[Range]) -> Range:
    return min(begin for begin, _ in ranges), max(end for _, end in ranges)
