"""Small pieces of Triton code that the kernels of sparse attention share."""

import triton
import triton.language as tl


@triton.jit
def load_item(items, index):
    """Return an item's tile of keys and the bounds of its rows, int64."""
    at = items + index.to(tl.int64) * 3
    return tl.load(at), tl.load(at + 1), tl.load(at + 2)


@triton.jit
def load_places(rows, first, end, G: tl.constexpr, ROWS: tl.constexpr):
    """Return for the rows from `first` on whether they are there, their pairs and heads, and their places in q."""
    flat = first + tl.arange(0, ROWS)
    there = flat < end
    pair, head = flat // G, flat % G
    return there, pair, head, tl.load(rows + pair, mask=there, other=0) * G + head


@triton.jit
def gathered(pointer, place, COLUMNS: tl.constexpr, DIM: tl.constexpr):
    """Return pointers `[rows, COLUMNS]` into what lies DIM elements by DIM elements, place an int64 `[rows]`."""
    return pointer + place[:, None] * DIM + tl.arange(0, COLUMNS)[None, :]


@triton.jit
def inside(there, COLUMNS: tl.constexpr, DIM: tl.constexpr):
    """Return which of `[rows, COLUMNS]` are there, and not behind DIM."""
    return there[:, None] & (tl.arange(0, COLUMNS) < DIM)[None, :]


@triton.jit
def tile_at(pointer, tile, per_lane, lanes, row_stride, lane_stride, token_stride, WIDTH: tl.constexpr):
    """Return where a tile of keys of a tensor `[B, lanes, Tk, D]` begins."""
    lane = tile // per_lane
    return (
        pointer
        + lane // lanes * row_stride
        + lane % lanes * lane_stride
        + (tile % per_lane * WIDTH) * token_stride
    )  # fmt: skip


@triton.jit
def tile_count(tile, per_lane, tokens, WIDTH: tl.constexpr):
    """Return how many keys a tile has: the last one of a lane may be short."""
    return tl.minimum(tokens - tile % per_lane * WIDTH, WIDTH)
