"""The forward pass: a program gathers the queries that visit a tile of keys; each pair's out and lse lie by themselves.

`turns.py` merges them. What is read of keys is proportional to what is selected, over the rows of a program.
"""

import triton
import triton.language as tl

from longctx.kernels.block_sparse.triton.device import (
    gathered,
    inside,
    load_item,
    load_places,
    tile_at,
    tile_count,
)
from longctx.kernels.softmax.triton.device import LN_2, load_block, visible
from longctx.kernels.softmax.triton.forward import attend


@triton.jit
def _multiply(
    acc, q, k, v, first, lo, hi, count, k_stride, v_stride, factor,
    D: tl.constexpr, DV: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Take one block of keys into acc `[rows, BV]`: products themselves are the weights."""
    keys = load_block(k, first, k_stride, count, BN, BD, MASKED, D)
    s = tl.dot(q, tl.trans(keys), input_precision=PRECISION) * factor
    if MASKED:
        s = tl.where(visible(lo, hi, first + tl.arange(0, BN)), s, 0.0)
    values = load_block(v, first, v_stride, count, BN, BV, MASKED, DV)
    return tl.dot(s.to(values.dtype), values, acc, input_precision=PRECISION)


@triton.jit(do_not_specialize=["k_tokens", "per_lane", "lanes"])
def forward_kernel(
    q, k, v, outs, lses, items, rows, numbers, los, his, factor, softcap, k_tokens, per_lane, lanes,
    kb, kl, kt, vb, vl, vt,
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    MASKED: tl.constexpr, SOFTCAP: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write outs `[P, G, Dv]` and, but with SUM, lses `[P, G]`, float32, by the numbers of pairs.

    q `[B T HS, G, D]` has no gaps; k and v are `[B, lanes, Tk, .]` of strides b, l, t. `rows, numbers, los, his` `[P]`
    are those of `Pairs`, rows being places in q; items `[N2, 3]` those of `Pieces`.
    """
    NATURAL: tl.constexpr = q.dtype.element_ty == tl.float32
    tile, begin, end = load_item(items, tl.program_id(0))
    there, pair, head, place = load_places(rows, begin, end, G, BM)
    q_block = tl.load(gathered(q, place, BD, D), mask=inside(there, BD, D), other=0.0)
    keys = tile_at(k, tile, per_lane, lanes, kb, kl, kt, WIDTH)
    values = tile_at(v, tile, per_lane, lanes, vb, vl, vt, WIDTH)
    count = tile_count(tile, per_lane, k_tokens, WIDTH)
    lo, hi = begin, end
    if MASKED:
        lo = tl.load(los + pair, mask=there, other=0).to(tl.int32)
        hi = tl.load(his + pair, mask=there, other=0).to(tl.int32)
    acc = tl.zeros((BM, BV), tl.float32)
    top, total = tl.full((BM,), float("-inf"), tl.float32), tl.zeros((BM,), tl.float32)
    for first in range(0, WIDTH, BN):
        if SUM:
            acc = _multiply(
                acc, q_block, keys, values, first, lo, hi, count, kt, vt, factor, D, DV, BN, BD, BV, MASKED, PRECISION
            )  # fmt: skip
        else:
            acc, top, total = attend(
                acc, top, total, q_block, keys, values, first, lo, hi, count, kt, vt, factor, softcap,
                D, DV, BN, BD, BV, MASKED, SOFTCAP, NATURAL, PRECISION,
            )  # fmt: skip
    at = tl.load(numbers + pair, mask=there, other=0) * G + head
    if not SUM:
        total = tl.where(total == 0.0, 1.0, total)  # of rows that are not there
        acc /= total[:, None]
        if NATURAL:
            lse = top + tl.log(total)
        else:
            lse = (top + tl.log2(total)) * LN_2
        tl.store(lses + at, lse, mask=there)
    tl.store(gathered(outs, at, BV, DV), acc, mask=inside(there, BV, DV))
