"""The backward pass without atomics: dq by blocks of queries, dk and dv by blocks of keys. Both make the weights again.

With p = exp(s - lse): dv = p^T dout, ds = p (dout v^T - delta), times 1 - (s / c)^2 under a softcap c; dq = scale ds k,
dk = scale ds^T q (FlashAttention, arXiv 2205.14135, appendix B). All are added to what is there.
"""

import triton
import triton.language as tl

from longctx.kernels.softmax.triton.device import (
    LOG2_E,
    block_at,
    capped,
    load_block,
    load_item,
    rows_at,
    visible,
)


@triton.jit
def _weights(product, lse, begin, end, columns, factor, softcap, MASKED: tl.constexpr, SOFTCAP: tl.constexpr):
    """Return p and ds / (dp - delta), `[rows, columns]`. What is hidden is 0 and never exponentiated."""
    s, slope = product * factor, 1.0
    if SOFTCAP:
        s, slope = capped(s, softcap)
    power = (s - lse) * LOG2_E
    if MASKED:
        power = tl.where(visible(begin, end, columns), power, float("-inf"))
    p = tl.exp2(power)
    return p, p * slope


@triton.jit
def _query_gradient(
    acc, q, dout, lse, delta, k, v, first, rows_begin, rows_end, k_tokens, k_stride, v_stride, factor, softcap,
    D: tl.constexpr, DV: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    MASKED: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add what one block of keys gives to a block of queries' dq, but for the scale."""
    columns = first + tl.arange(0, BN)
    keys = load_block(k, first, k_stride, k_tokens, BN, BD, MASKED, D)
    values = load_block(v, first, v_stride, k_tokens, BN, BV, MASKED, DV)
    product = tl.dot(q, tl.trans(keys), input_precision=PRECISION)
    _, slope = _weights(product, lse[:, None], rows_begin, rows_end, columns, factor, softcap, MASKED, SOFTCAP)
    dp = tl.dot(dout, tl.trans(values), input_precision=PRECISION)
    ds = slope * (dp - delta[:, None])
    return tl.dot(ds.to(keys.dtype), keys, acc, input_precision=PRECISION)


@triton.jit(do_not_specialize=["q_tokens", "k_tokens", "count", "rows"])
def query_gradient_kernel(
    q, k, v, dout, lse, delta, dq, items, ranges, begins, ends, factor, softcap, scale, q_tokens, k_tokens, count, rows,
    qb, qt, qh, kb, kt, kh, vb, vt, vh, ob, ot, oh, lb, lh, lt, eb, eh, et, gb, gt, gh,
    D: tl.constexpr, DV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    SOFTCAP: tl.constexpr, PERSISTENT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add to dq `[B, Tq, H, D]`, float32; strides are those of q, k, v, dout (o), lse (l), delta (e) and dq (g)."""
    end_item, step = tl.program_id(0) + 1, 1
    if PERSISTENT:
        end_item, step = count, tl.num_programs(0)
    for index in range(tl.program_id(0), end_item, step):
        block, whole, masked, end, _, b, head, kv_head = load_item(items, index)
        first = block * BM
        row = first + tl.arange(0, BM)
        there = row < q_tokens
        q_block = load_block(q + b * qb + head * qh, first, qt, q_tokens, BM, BD, True, D)
        dout_block = load_block(dout + b * ob + head * oh, first, ot, q_tokens, BM, BV, True, DV)
        row_lse = tl.load(rows_at(lse + b * lb + head * lh, first, lt, BM), mask=there, other=0.0)
        row_delta = tl.load(rows_at(delta + b * eb + head * eh, first, et, BM), mask=there, other=0.0)
        k_head, v_head = k + b * kb + kv_head * kh, v + b * vb + kv_head * vh
        acc = tl.zeros((BM, BD), tl.float32)
        for r in range(whole, masked):
            at = ranges + r * 3
            for n in range(tl.load(at), tl.load(at + 1)):
                acc = _query_gradient(
                    acc, q_block, dout_block, row_lse, row_delta, k_head, v_head, n * BN, row, row, k_tokens, kt, vt,
                    factor, softcap, D, DV, BN, BD, BV, False, SOFTCAP, PRECISION,
                )  # fmt: skip
        for r in range(masked, end):
            at = ranges + r * 3
            seen = tl.load(at + 2).to(tl.int64) * rows + row
            row_begin, row_end = tl.load(begins + seen, mask=there, other=0), tl.load(ends + seen, mask=there, other=0)
            for n in range(tl.load(at), tl.load(at + 1)):
                acc = _query_gradient(
                    acc, q_block, dout_block, row_lse, row_delta, k_head, v_head, n * BN, row_begin, row_end, k_tokens,
                    kt, vt, factor, softcap, D, DV, BN, BD, BV, True, SOFTCAP, PRECISION,
                )  # fmt: skip
        dq_at = block_at(dq + b * gb + head * gh, first, gt, BM, BD)
        mask = there[:, None] & (tl.arange(0, BD) < D)[None, :]
        tl.store(dq_at, tl.load(dq_at, mask=mask, other=0.0) + acc * scale, mask=mask)


@triton.jit
def _key_gradients(
    dk, dv, keys, values, q, dout, lse, delta, first, key_begin, key_end, q_tokens, q_stride, o_stride, l_stride,
    e_stride, factor, softcap,
    D: tl.constexpr, DV: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    MASKED: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add what a block of queries gives to a block of keys' dk (but for the scale) and dv; scores stand transposed."""
    columns = first + tl.arange(0, BM)
    there = columns < q_tokens
    q_block = load_block(q, first, q_stride, q_tokens, BM, BD, MASKED, D)
    dout_block = load_block(dout, first, o_stride, q_tokens, BM, BV, MASKED, DV)
    column_lse = tl.load(rows_at(lse, first, l_stride, BM), mask=there, other=0.0)
    column_delta = tl.load(rows_at(delta, first, e_stride, BM), mask=there, other=0.0)
    product = tl.dot(keys, tl.trans(q_block), input_precision=PRECISION)
    p, slope = _weights(product, column_lse[None, :], key_begin, key_end, columns, factor, softcap, MASKED, SOFTCAP)
    dv = tl.dot(p.to(dout_block.dtype), dout_block, dv, input_precision=PRECISION)
    dp = tl.dot(values, tl.trans(dout_block), input_precision=PRECISION)
    ds = slope * (dp - column_delta[None, :])
    dk = tl.dot(ds.to(q_block.dtype), q_block, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["q_tokens", "k_tokens", "count", "rows"])
def key_gradients_kernel(
    q, k, v, dout, lse, delta, dk, dv, items, ranges, begins, ends, factor, softcap, scale, q_tokens, k_tokens, count,
    rows, qb, qt, qh, kb, kt, kh, vb, vt, vh, ob, ot, oh, lb, lh, lt, eb, eh, et, gb, gt, gh, wb, wt, wh,
    D: tl.constexpr, DV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    SOFTCAP: tl.constexpr, PERSISTENT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add to dk `[B, Tk, HK, D]` and dv `[B, Tk, HK, Dv]`, float32; strides as above, dk's are g and dv's w."""
    end_item, step = tl.program_id(0) + 1, 1
    if PERSISTENT:
        end_item, step = count, tl.num_programs(0)
    for index in range(tl.program_id(0), end_item, step):
        block, whole, masked, end, heads, b, first_head, kv_head = load_item(items, index)
        first = block * BN
        key = first + tl.arange(0, BN)
        there = key < k_tokens
        keys = load_block(k + b * kb + kv_head * kh, first, kt, k_tokens, BN, BD, True, D)
        values = load_block(v + b * vb + kv_head * vh, first, vt, k_tokens, BN, BV, True, DV)
        dk_block, dv_block = tl.zeros((BN, BD), tl.float32), tl.zeros((BN, BV), tl.float32)
        for each in range(heads):
            head = first_head + each
            q_head, dout_head = q + b * qb + head * qh, dout + b * ob + head * oh
            lse_head, delta_head = lse + b * lb + head * lh, delta + b * eb + head * eh
            for r in range(whole, masked):
                at = ranges + r * 3
                for m in range(tl.load(at), tl.load(at + 1)):
                    dk_block, dv_block = _key_gradients(
                        dk_block, dv_block, keys, values, q_head, dout_head, lse_head, delta_head, m * BM, key, key,
                        q_tokens, qt, ot, lt, et, factor, softcap, D, DV, BM, BD, BV, False, SOFTCAP, PRECISION,
                    )  # fmt: skip
            for r in range(masked, end):
                at = ranges + r * 3
                seen = tl.load(at + 2).to(tl.int64) * rows + key
                key_begin = tl.load(begins + seen, mask=there, other=0)
                key_end = tl.load(ends + seen, mask=there, other=0)
                for m in range(tl.load(at), tl.load(at + 1)):
                    dk_block, dv_block = _key_gradients(
                        dk_block, dv_block, keys, values, q_head, dout_head, lse_head, delta_head, m * BM, key_begin,
                        key_end, q_tokens, qt, ot, lt, et, factor, softcap, D, DV, BM, BD, BV, True, SOFTCAP, PRECISION,
                    )  # fmt: skip
        dk_at = block_at(dk + b * gb + kv_head * gh, first, gt, BN, BD)
        dv_at = block_at(dv + b * wb + kv_head * wh, first, wt, BN, BV)
        mask, value_mask = (
            there[:, None] & (tl.arange(0, BD) < D)[None, :],
            there[:, None] & (tl.arange(0, BV) < DV)[None, :],
        )
        tl.store(dk_at, tl.load(dk_at, mask=mask, other=0.0) + dk_block * scale, mask=mask)
        tl.store(dv_at, tl.load(dv_at, mask=value_mask, other=0.0) + dv_block, mask=value_mask)
