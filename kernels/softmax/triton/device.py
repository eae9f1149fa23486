"""Small pieces of Triton code that the kernels of softmax attention share."""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_item(items, index):
    """Return an item's block of rows, the bounds of its ranges, how many query heads; as int64 row, head, KV head."""
    at = items + index * 8
    row, head, kv_head = tl.load(at + 4).to(tl.int64), tl.load(at + 5).to(tl.int64), tl.load(at + 6).to(tl.int64)
    return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), tl.load(at + 7), row, head, kv_head


@triton.jit
def rows_at(pointer, first, stride, ROWS: tl.constexpr):
    """Return pointers `[ROWS]`: `stride` elements apart from row `first` on, int64 throughout."""
    return pointer + (first + tl.arange(0, ROWS)).to(tl.int64) * stride


@triton.jit
def block_at(pointer, first, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return pointers `[ROWS, COLUMNS]`, likewise, columns side by side.

    Offsets inside of a block, added to a block's place, would be kept in registers from one block to the next.
    """
    return rows_at(pointer, first, stride, ROWS)[:, None] + tl.arange(0, COLUMNS)[None, :]


@triton.jit
def load_block(
    pointer, first, stride, count, ROWS: tl.constexpr, COLUMNS: tl.constexpr, MASKED: tl.constexpr, DIM: tl.constexpr
):  # fmt: skip
    """Load `[ROWS, COLUMNS]` from row `first` on; 0 from column DIM on, and with MASKED from row `count` on."""
    at = block_at(pointer, first, stride, ROWS, COLUMNS)
    columns = (tl.arange(0, COLUMNS) < DIM)[None, :]
    if MASKED:
        return tl.load(at, mask=(first + tl.arange(0, ROWS) < count)[:, None] & columns, other=0.0)
    elif COLUMNS == DIM:
        return tl.load(at)
    else:
        return tl.load(at, mask=columns, other=0.0)


@triton.jit
def capped(x, softcap):
    """Return the capped score `softcap * tanh(x)` and its derivative over softcap, `1 - tanh(x)^2`.

    By e = exp(-2 |x|), which never overflows and of which both are quotients without cancellation; near 0, where
    1 - e would have some, by tanh's series.
    """
    size = tl.abs(x)
    e = tl.exp(-2.0 * size)
    inverse = 1.0 / (1.0 + e)
    y = x * x
    series = 62.0 / 2835.0 + y * (-1382.0 / 155925.0)
    series = 1.0 + y * (-1.0 / 3.0 + y * (2.0 / 15.0 + y * (-17.0 / 315.0 + y * series)))
    large = (1.0 - e) * inverse
    return softcap * tl.where(size < 0.35, x * series, tl.where(x < 0, -large, large)), 4.0 * e * inverse * inverse


@triton.jit
def visible(begin, end, columns):
    """Return bool `[rows, columns]`: which columns the rows see."""
    return (columns[None, :] >= begin[:, None]) & (columns[None, :] < end[:, None])
