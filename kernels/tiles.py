"""From two shards, cut at document bounds, and a mask to the list of banded tiles between them. Integers only."""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence

from longctx.kernels.mask import Mask
from longctx.kernels.positions import Piece, Tile, make_tile


def tiles_between(
    q_documents: Sequence[Sequence[Piece]], k_documents: Sequence[Sequence[Piece]], *, mask: Mask
) -> tuple[Tile, ...]:
    """Return every tile in which a query of one shard sees a key of another.

    Costs O(q pieces x log(k pieces)): the k pieces that a q piece sees completely are one tile, since a document's
    pieces are adjacent in a shard.

    Args:
        q_documents: the queries' shard, cut at the mask's document bounds (`positions.cut`).
        k_documents: the keys' shard, likewise, of the same stride.
        mask: who may see whom, in global positions.
    """
    tiles: list[Tile] = []
    for q_pieces, k_pieces in zip(q_documents, k_documents, strict=True):
        if not q_pieces or not k_pieces:
            continue
        starts = [piece.segment.start for piece in k_pieces]
        lasts = [piece.segment.last for piece in k_pieces]
        for q in q_pieces:
            tiles.extend(_row_of_tiles(q, k_pieces, starts, lasts, mask))
    return tuple(tiles)


def _row_of_tiles(
    q: Piece, k_pieces: Sequence[Piece], starts: Sequence[int], lasts: Sequence[int], mask: Mask
) -> list[Tile]:
    first, last = q.segment.start, q.segment.last
    # k pieces [seen_begin, seen_end) are seen by some query, [full_begin, full_end) entirely by all of them.
    seen_begin, full_begin = 0, 0
    seen_end, full_end = len(k_pieces), len(k_pieces)
    if mask.left is not None:
        seen_begin = bisect_left(lasts, first - mask.left)
        full_begin = bisect_left(starts, last - mask.left)
    if mask.right is not None:
        seen_end = bisect_right(starts, last + mask.right)
        full_end = bisect_right(lasts, first + mask.right)
    if full_begin >= full_end:
        full_begin = full_end = seen_end
    tiles = [_banded(q, k, mask) for k in k_pieces[seen_begin:full_begin]]
    if full_begin < full_end:
        begin, end = k_pieces[full_begin].begin, k_pieces[full_end - 1].end
        n, m = q.segment.count, end - begin
        tiles.append(Tile(q.begin, n, begin, m, 1 - n, m - 1))
    tiles.extend(_banded(q, k, mask) for k in k_pieces[full_end:seen_end])
    return [tile for tile in tiles if tile is not None]


def _banded(q: Piece, k: Piece, mask: Mask) -> Tile | None:
    a, b = q.segment, k.segment
    assert a.stride == b.stride or a.count == 1 or b.count == 1, (a, b)
    stride = b.stride if a.count == 1 else a.stride
    offset = a.start - b.start
    # b.start + j*stride - a.start - i*stride in [-left, right]  <=>  lo <= j - i <= hi
    lo = 1 - a.count if mask.left is None else -((mask.left - offset) // stride)
    hi = b.count - 1 if mask.right is None else (offset + mask.right) // stride
    return make_tile(q, k, lo=lo, hi=hi)
