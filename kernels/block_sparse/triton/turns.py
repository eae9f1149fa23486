"""Merge and sum what lies side by side, one after the other: the same bits every time."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["tokens", "heads"])
def merge_kernel(
    outs, lses, begins, rows, out, lse, tokens, heads, ob, ot, oh, lb, lh, lt,
    G: tl.constexpr, DV: tl.constexpr, BG: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Merge each query's pairs into out `[B, T, H, Dv]` and lse `[B, H, T]`, float32, of strides b, t, h.

    outs `[P, G, Dv]` and lses `[P, G]` from `begins[n]` to `begins[n + 1] - 1` are those of query `rows[n]`, a number
    of `(b, t, hs)`; heads is HS.
    """
    n = tl.program_id(0)
    row, begin = tl.load(rows + n), tl.load(begins + n)
    count = (tl.load(begins + n + 1) - begin).to(tl.int32)
    b, t = row // (tokens * heads), row // heads % tokens
    each, columns = tl.arange(0, BG), tl.arange(0, BV)
    head = row % heads * G + each
    there = each < G
    mask = there[:, None] & (columns < DV)[None, :]
    out_at = out + b * ob + t * ot + head[:, None] * oh + columns[None, :]
    lse_at = lse + b * lb + t * lt + head * lh
    acc, top = tl.load(out_at, mask=mask, other=0.0), tl.load(lse_at, mask=there, other=float("-inf"))
    total = tl.where(top == float("-inf"), 0.0, 1.0)
    for turn in range(count):
        at = (begin + turn) * G + each
        own = tl.load(lses + at, mask=there, other=float("-inf"))
        part = tl.load(outs + at[:, None] * DV + columns[None, :], mask=mask, other=0.0)
        new_top = tl.maximum(top, own)
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        share, shrink = tl.exp(own - base), tl.exp(top - base)
        acc = acc * shrink[:, None] + part * share[:, None]
        total = total * shrink + share
        top = new_top
    blind = total == 0.0
    total = tl.where(blind, 1.0, total)
    tl.store(out_at, acc / total[:, None], mask=mask)
    tl.store(lse_at, tl.where(blind, float("-inf"), top + tl.log(total)), mask=there)


@triton.jit(do_not_specialize=["columns"])
def sum_kernel(parts, begins, targets, out, scale, columns, BLOCK: tl.constexpr):
    """Add to row `targets[n]` of out `[., columns]` the rows of parts from `begins[n]` to `begins[n + 1] - 1`."""
    n = tl.program_id(0)
    target, begin = tl.load(targets + n), tl.load(begins + n)
    count = (tl.load(begins + n + 1) - begin).to(tl.int32)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = column < columns
    acc = tl.zeros((BLOCK,), tl.float32)
    for turn in range(count):
        acc += tl.load(parts + (begin + turn) * columns + column, mask=there, other=0.0)
    at = out + target * columns + column
    tl.store(at, tl.load(at, mask=there, other=0.0) + acc * scale, mask=there)
