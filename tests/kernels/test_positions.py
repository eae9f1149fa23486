"""Segments, cuts and tiles against counting by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longctx.kernels.positions import Piece, Segment, cut, make_tile


@given(st.integers(0, 30), st.integers(1, 7), st.integers(1, 9), st.integers(-5, 90))
def test_index_at_or_after_is_the_first_such_index(start, stride, count, position):
    segment = Segment(start, stride, count)
    positions = [start + i * stride for i in range(count)]
    assert segment.last == positions[-1]
    assert segment.index_at_or_after(position) == sum(p < position for p in positions)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(-12, 12), st.integers(-12, 12))
def test_a_tile_counts_its_visible_pairs_and_is_none_when_empty(rows, columns, lo, hi):
    tile = make_tile(Piece(3, Segment(0, 1, rows)), Piece(2, Segment(0, 1, columns)), lo=lo, hi=hi)
    visible = [(i, j) for i in range(rows) for j in range(columns) if lo <= j - i <= hi]
    if tile is None:
        assert not visible
        return
    assert tile.pairs == len(visible) > 0
    assert tile.full == (len(visible) == rows * columns)
    assert (tile.q_begin, tile.k_begin) == (3, 2)


def test_tile_counts_do_not_overflow_at_millions_of_tokens():
    n = 4_000_000
    tile = make_tile(Piece(0, Segment(0, 1, n)), Piece(0, Segment(0, 1, n)), lo=1 - n, hi=0)
    assert tile is not None and tile.pairs == n * (n + 1) // 2


@given(st.data())
def test_cut_gives_every_local_index_to_its_document_once(data):
    stride = data.draw(st.integers(1, 4))
    count = data.draw(st.integers(1, 12))
    start = data.draw(st.integers(0, 3))
    total = start + (count - 1) * stride + 1 + data.draw(st.integers(0, 5))
    inner = data.draw(st.sets(st.integers(1, max(total - 1, 1)), max_size=6))
    bounds = (0, *sorted(b for b in inner if b < total), total)
    seen = {}
    for document, pieces in enumerate(cut([Segment(start, stride, count)], bounds)):
        for piece in pieces:
            for i in range(piece.segment.count):
                position = piece.segment.start + i * piece.segment.stride
                assert bounds[document] <= position < bounds[document + 1]
                assert position == start + (piece.begin + i) * stride
                assert piece.begin + i not in seen
                seen[piece.begin + i] = document
    assert sorted(seen) == list(range(count))


@pytest.mark.parametrize("bounds", [(0, 3, 3, 8), (1, 8), (0, 7), (0, 5, 4, 8), (8,)])
def test_bad_document_bounds_are_refused(bounds):
    from longctx.kernels.positions import check_bounds

    with pytest.raises(ValueError, match="strictly upwards from 0 to 8"):
        check_bounds(bounds, total=8)
