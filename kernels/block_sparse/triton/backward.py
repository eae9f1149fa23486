"""The backward pass without atomics: a program has a tile of keys, and goes through queries that visit it.

With p = exp(s - lse): dv = p^T dout, ds = p (dout v^T - delta), times 1 - (s / c)^2 under a softcap c; dq = scale ds k,
dk = scale ds^T q (FlashAttention, arXiv 2205.14135, appendix B). A pair's dq and a program's dk and dv lie by
themselves, but for the scale; `turns.py` sums them.
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
from longctx.kernels.softmax.triton.device import LOG2_E, capped, load_block


@triton.jit
def _weights(product, lse, seen, factor, softcap, MASKED: tl.constexpr, SOFTCAP: tl.constexpr, SUM: tl.constexpr):
    """Return the weights p and ds / (dp - delta), `[keys, rows]`. What is hidden is 0 and never exponentiated."""
    s, slope = product * factor, 1.0
    if SUM:
        p, slope = s, tl.full(s.shape, 1.0, tl.float32)
        if MASKED:
            p, slope = tl.where(seen, p, 0.0), tl.where(seen, slope, 0.0)
    else:
        if SOFTCAP:
            s, slope = capped(s, softcap)
        power = (s - lse[None, :]) * LOG2_E
        if MASKED:
            power = tl.where(seen, power, float("-inf"))
        p = tl.exp2(power)
        slope = p * slope
    return p, slope


@triton.jit(do_not_specialize=["k_tokens", "per_lane", "lanes", "slots_each"])
def backward_kernel(
    q, k, v, dout, lse, delta, dqs, dks, dvs, items, rows, numbers, slots, los, his, factor, softcap, k_tokens,
    per_lane, lanes, slots_each, kb, kl, kt, vb, vl, vt,
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    MASKED: tl.constexpr, SOFTCAP: tl.constexpr, GATED: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write dqs `[P, G, D]` by the numbers of pairs, dks `[N2, WIDTH, D]` and dvs `[N2, WIDTH, Dv]` by items, float32.

    q `[B T HS, G, D]` and dout `[B T HS, G, Dv]` have no gaps, and lse and delta `[B T HS, G]` neither; with GATED
    these are `[B T HS, G, slots]`, of each slot. The tile is one block: `WIDTH <= BN`. Scores stand transposed.
    """
    index = tl.program_id(0)
    tile, begin, end = load_item(items, index)
    count = tile_count(tile, per_lane, k_tokens, WIDTH)
    keys = load_block(tile_at(k, tile, per_lane, lanes, kb, kl, kt, WIDTH), 0, kt, count, BN, BD, True, D)
    values = load_block(tile_at(v, tile, per_lane, lanes, vb, vl, vt, WIDTH), 0, vt, count, BN, BV, True, DV)
    key = tl.arange(0, BN)
    dk, dv = tl.zeros((BN, BD), tl.float32), tl.zeros((BN, BV), tl.float32)
    for m in range((end - begin + BM - 1).to(tl.int32) // BM):
        there, pair, head, place = load_places(rows, begin + m * BM, end, G, BM)
        at = tl.load(numbers + pair, mask=there, other=0) * G + head
        q_block = tl.load(gathered(q, place, BD, D), mask=inside(there, BD, D), other=0.0)
        dout_block = tl.load(gathered(dout, place, BV, DV), mask=inside(there, BV, DV), other=0.0)
        row_lse, row_delta = tl.zeros((BM,), tl.float32), tl.zeros((BM,), tl.float32)
        if not SUM:
            term = place
            if GATED:
                term = place * slots_each + tl.load(slots + pair, mask=there, other=0)
            row_lse = tl.load(lse + term, mask=there, other=0.0)
            row_delta = tl.load(delta + term, mask=there, other=0.0)
        seen = key[:, None] < WIDTH
        if MASKED:
            lo = tl.load(los + pair, mask=there, other=0).to(tl.int32)
            hi = tl.load(his + pair, mask=there, other=0).to(tl.int32)
            seen = (key[:, None] >= lo[None, :]) & (key[:, None] < hi[None, :])
        product = tl.dot(keys, tl.trans(q_block), input_precision=PRECISION)
        p, slope = _weights(product, row_lse, seen, factor, softcap, MASKED, SOFTCAP, SUM)
        dv = tl.dot(p.to(dout_block.dtype), dout_block, dv, input_precision=PRECISION)
        dp = tl.dot(values, tl.trans(dout_block), input_precision=PRECISION)
        ds = (slope * (dp - row_delta[None, :])).to(keys.dtype)
        dk = tl.dot(ds, q_block, dk, input_precision=PRECISION)
        dq = tl.dot(tl.trans(ds), keys, input_precision=PRECISION)
        tl.store(gathered(dqs, at, BD, D), dq, mask=inside(there, BD, D))
    item = index.to(tl.int64) * WIDTH + key
    mine = key < WIDTH
    tl.store(gathered(dks, item, BD, D), dk, mask=inside(mine, BD, D))
    tl.store(gathered(dvs, item, BV, DV), dv, mask=inside(mine, BV, DV))
