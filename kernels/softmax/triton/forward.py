"""The forward pass: FlashAttention-2's loop (arXiv 2307.08691, algorithm 1) over the ranges that a block visits.

It goes on from what earlier hops left in `out` and `lse`, and leaves there what comes of both.
"""

import triton
import triton.language as tl

from longctx.kernels.softmax.triton.device import (
    LN_2,
    LOG2_E,
    block_at,
    capped,
    load_block,
    load_item,
    rows_at,
    visible,
)


@triton.jit
def attend(
    acc, top, total, q, k, v, first, rows_begin, rows_end, k_tokens, k_stride, v_stride, factor, softcap,
    D: tl.constexpr, DV: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    MASKED: tl.constexpr, SOFTCAP: tl.constexpr, NATURAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Take one block of keys into acc `[rows, BV]`, the largest scores `top` and the sums `total`.

    Scores and `top` are to base 2 where inputs have 16 bits: one multiplication less. Where they have 32 that would
    round every score once more, so that a row's only weight would not be 1.
    """
    columns = first + tl.arange(0, BN)
    keys = load_block(k, first, k_stride, k_tokens, BN, BD, MASKED, D)
    product = tl.dot(q, tl.trans(keys), input_precision=PRECISION)
    s = product * factor
    if SOFTCAP:
        s, _ = capped(s, softcap)
    if not NATURAL:
        s *= LOG2_E
    if MASKED:
        s = tl.where(visible(rows_begin, rows_end, columns), s, float("-inf"))
    new_top = tl.maximum(top, tl.max(s, 1))
    base = new_top
    if MASKED:
        base = tl.where(new_top == float("-inf"), 0.0, new_top)  # of rows that have seen nothing yet
    if NATURAL:
        p, shrink = tl.exp(s - base[:, None]), tl.exp(top - base)
    else:
        p, shrink = tl.exp2(s - base[:, None]), tl.exp2(top - base)
    total = total * shrink + tl.sum(p, 1)
    values = load_block(v, first, v_stride, k_tokens, BN, BV, MASKED, DV)
    acc = tl.dot(p.to(values.dtype), values, acc * shrink[:, None], input_precision=PRECISION)
    return acc, new_top, total


@triton.jit(do_not_specialize=["q_tokens", "k_tokens", "count", "rows"])
def forward_kernel(
    q, k, v, out, lse, items, ranges, begins, ends, factor, softcap, q_tokens, k_tokens, count, rows,
    qb, qt, qh, kb, kt, kh, vb, vt, vh, ob, ot, oh, lb, lh, lt,
    D: tl.constexpr, DV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    SOFTCAP: tl.constexpr, PERSISTENT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Merge attention into out `[B, Tq, H, Dv]` and lse `[B, H, Tq]`, float32; strides are b, t, h of each tensor."""
    NATURAL: tl.constexpr = q.dtype.element_ty == tl.float32
    end_item, step = tl.program_id(0) + 1, 1
    if PERSISTENT:
        end_item, step = count, tl.num_programs(0)
    for index in range(tl.program_id(0), end_item, step):
        block, whole, masked, end, _, b, head, kv_head = load_item(items, index)
        first = block * BM
        row = first + tl.arange(0, BM)
        there = row < q_tokens
        q_block = load_block(q + b * qb + head * qh, first, qt, q_tokens, BM, BD, True, D)
        k_head, v_head = k + b * kb + kv_head * kh, v + b * vb + kv_head * vh
        lse_at = rows_at(lse + b * lb + head * lh, first, lt, BM)
        out_at = block_at(out + b * ob + head * oh, first, ot, BM, BV)
        out_mask = there[:, None] & (tl.arange(0, BV) < DV)[None, :]
        top = tl.load(lse_at, mask=there, other=float("-inf"))
        if not NATURAL:
            top *= LOG2_E
        total = tl.where(top == float("-inf"), 0.0, 1.0)
        acc = tl.load(out_at, mask=out_mask, other=0.0)
        for r in range(whole, masked):
            at = ranges + r * 3
            for n in range(tl.load(at), tl.load(at + 1)):
                acc, top, total = attend(
                    acc, top, total, q_block, k_head, v_head, n * BN, row, row, k_tokens, kt, vt, factor, softcap,
                    D, DV, BN, BD, BV, False, SOFTCAP, NATURAL, PRECISION,
                )  # fmt: skip
        for r in range(masked, end):
            at = ranges + r * 3
            seen = tl.load(at + 2).to(tl.int64) * rows + row
            row_begin, row_end = tl.load(begins + seen, mask=there, other=0), tl.load(ends + seen, mask=there, other=0)
            for n in range(tl.load(at), tl.load(at + 1)):
                acc, top, total = attend(
                    acc, top, total, q_block, k_head, v_head, n * BN, row_begin, row_end, k_tokens, kt, vt, factor,
                    softcap, D, DV, BN, BD, BV, True, SOFTCAP, NATURAL, PRECISION,
                )  # fmt: skip
        blind = total == 0.0
        total = tl.where(blind, 1.0, total)
        tl.store(out_at, acc / total[:, None], mask=out_mask)
        if NATURAL:
            merged = top + tl.log(total)
        else:
            merged = (top + tl.log2(total)) * LN_2
        tl.store(lse_at, tl.where(blind, float("-inf"), merged), mask=there)
