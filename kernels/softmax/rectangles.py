"""Split a banded tile into rectangles that a plain flash-attention call can serve. Integers only.

A rectangle is what one library call computes; one tile gives one to three, or one per block of rows under a window.

Library kernels know two masks, none and causal, and take an additive bias for anything else. So a tile becomes `full`
and `causal` rectangles of any size plus, where a window cuts it, `band` ones of bounded height whose bias is small.
Every row of every rectangle sees at least one key of it: library kernels disagree about empty rows.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from longctx.kernels.positions import Extent, Tile

BAND_ROWS_MIN, BAND_ROWS_MAX = 64, 512


@dataclass(frozen=True, slots=True)
class Rectangle(Extent):
    """Rows `[q_begin, q_begin + q_count)` against columns `[k_begin, k_begin + k_count)`, in shard-local indices.

    kind: `full` (all pairs), `causal` (column j is seen by row i iff j <= i, both from the rectangle's corner), `band`
    (iff lo <= j - i <= hi).
    """

    kind: Literal["full", "causal", "band"]
    q_begin: int
    q_count: int
    k_begin: int
    k_count: int
    lo: int = 0
    hi: int = 0


@lru_cache(maxsize=65536)
def rectangles(tile: Tile, *, square_causal: bool = False, high_bands: bool = False) -> tuple[Rectangle, ...]:
    """Cover the visible pairs of `tile` exactly once.

    Args:
        square_causal: emit causal rectangles with as many rows as columns only, for kernels that align a causal mask to
            the bottom right corner.
        high_bands: leave a band whole, for kernels that have windows and need no bias for them.
    """
    n, m, lo, hi = tile.q_count, tile.k_count, tile.lo, tile.hi
    q, k = tile.q_begin, tile.k_begin
    # Rows with something to see are [-hi, m - lo), columns that are seen [lo, n + hi).
    row, row_end = max(0, -hi), min(n, m - lo)
    q, n, lo, hi = q + row, row_end - row, lo + row, hi + row
    column, column_end = max(0, lo), min(m, n + hi)
    k, m, lo, hi = k + column, column_end - column, lo - column, hi - column
    assert n >= 1 and m >= 1, tile
    if lo > 1 - n and high_bands:
        return (Rectangle("band", q, n, k, m, lo, hi),)
    if lo > 1 - n:
        return _window_rectangles(q, n, k, m, lo, hi)
    if hi >= m - 1:
        return (Rectangle("full", q, n, k, m),)
    result = []
    if hi > 0:  # columns [0, hi) are seen by every row; the rest is causal from its own corner
        result.append(Rectangle("full", q, n, k, hi))
        k, m, hi = k + hi, m - hi, 0
    if square_causal and n > m:
        result.append(Rectangle("causal", q, m, k, m))
        result.append(Rectangle("full", q + m, n - m, k, m))
    else:
        result.append(Rectangle("causal", q, n, k, m))
    return tuple(result)


def _window_rectangles(q: int, n: int, k: int, m: int, lo: int, hi: int) -> tuple[Rectangle, ...]:
    """Cut rows into blocks about as high as the window is wide, so that at most about half of a block is masked."""
    height = min(max(hi - lo + 1, BAND_ROWS_MIN), BAND_ROWS_MAX)
    result = []
    for begin in range(0, n, height):
        rows = min(height, n - begin)
        first, end = max(0, begin + lo), min(m, begin + rows + hi)
        shift = begin - first  # j' - i' = j - i + shift
        result.append(Rectangle("band", q + begin, rows, k + first, end - first, lo + shift, hi + shift))
    return tuple(result)
