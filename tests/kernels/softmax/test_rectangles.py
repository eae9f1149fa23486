"""Rectangles cover a tile's visible pairs exactly once, and none has an empty row."""

from hypothesis import given
from hypothesis import strategies as st

from longctx.kernels.positions import Piece, Segment, Tile, make_tile
from longctx.kernels.softmax.rectangles import BAND_ROWS_MAX, rectangles

counts = st.integers(1, 12)
bounds = st.integers(-15, 15)


@given(counts, counts, bounds, bounds, st.booleans())
def test_rectangles_cover_the_band_once(rows, columns, lo, hi, square):
    tile = make_tile(Piece(7, Segment(0, 1, rows)), Piece(5, Segment(0, 1, columns)), lo=lo, hi=hi)
    if tile is None:
        return
    covered = []
    for shape in rectangles(tile, square_causal=square):
        assert not (square and shape.kind == "causal" and shape.q_count != shape.k_count)
        for i in range(shape.q_count):
            row = [j for j in range(shape.k_count) if sees(shape, i, j)]
            assert row, shape
            covered += [(shape.q_begin - 7 + i, shape.k_begin - 5 + j) for j in row]
    want = [(i, j) for i in range(rows) for j in range(columns) if lo <= j - i <= hi]
    assert sorted(covered) == want


def sees(shape, i: int, j: int) -> bool:
    if shape.kind == "band":
        return shape.lo <= j - i <= shape.hi
    return shape.kind == "full" or j <= i


def test_the_common_tiles_are_one_rectangle():
    n = 1000
    for lo, hi, kind in ((1 - n, n - 1, "full"), (1 - n, 0, "causal"), (1 - n, -1, "causal")):
        (shape,) = rectangles(Tile(0, n, 0, n, lo, hi))
        assert shape.kind == kind


def test_a_window_costs_what_it_sees_and_not_the_square():
    n, window = 100_000, 256
    shapes = rectangles(Tile(0, n, 0, n, -window, 0))
    assert all(shape.q_count <= BAND_ROWS_MAX for shape in shapes)
    computed = sum(shape.q_count * shape.k_count for shape in shapes)
    assert computed <= 2.1 * n * window
