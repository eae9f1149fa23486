"""The scan over a segment's chunks, forwards and backwards, and the outputs; see `delta_prepare.py` for the letters.

    x = U - W S    out = Q S + A x    S' = D S + K^T x

and, with E' the gradient of S':

    dx = K E' + A^T dout    E = D E' + Q^T dout - W^T dx

One program takes all chunks of a segment for one head and BV columns, with its state in float32 registers. Each chunk
leaves its S and x (E' and dx) behind, from which outputs and gradients of all chunks are computed side by side.
"""

import triton
import triton.language as tl

from longctx.kernels.linear.triton.chunk_forward import locate
from longctx.kernels.linear.triton.delta_prepare import SIZES
from longctx.kernels.linear.triton.device import load_rows, load_state, store_rows, store_state


@triton.jit
def state_at(b, index, indices, h, H, size: tl.constexpr):
    """Return where [b, index, h] of [B, indices, H, size] begins."""
    return ((b * indices + index) * H + h) * size


@triton.jit(do_not_specialize=SIZES)
def scan_kernel(
    ks, w, u, decays, initial, begins, counts, bounds,
    states, x_out, final,
    tokens, chunks, segments,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    IDENTITY: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """States of one of P segments, head and block of columns; grid (B P H, blocks of V); BK >= K.

    ks, w [B, T, H, K]; u [B, T, H, V], None = 0; decays [B, N, H, K]; initial [B, P, H, K, V] float32, None = 0, or the
    identity if IDENTITY; bounds [P + 1]: chunks of each segment. states [B, N, H, K, V], x_out [B, T, H, V]: None = not
    kept; final [B, P, H, K, V] float32. WIDE: products of float32, whatever the inputs are.
    """
    program, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BV
    h, p, b = program % H, program // H % segments, program // H // segments
    rows, keys, values = tl.arange(0, C), tl.arange(0, BK), column + tl.arange(0, BV)
    operand = tl.float32 if WIDE else w.dtype.element_ty

    s = tl.zeros([BK, BV], tl.float32)
    if IDENTITY:
        s = tl.where(keys[:, None] == values[None, :], 1.0, s)
    if initial is not None:
        s = load_state(initial + state_at(b, p, segments, h, H, K * V), keys, values, K, V)
    for chunk in range(tl.load(bounds + p), tl.load(bounds + p + 1)):
        begin, count = tl.load(begins + chunk), tl.load(counts + chunk)
        base, there = (b * tokens + begin) * H + h, rows < count
        if states is not None:
            store_state(states + state_at(b, chunk, chunks, h, H, K * V), keys, values, s, K, V)
        ww = load_rows(w + base * K, rows, keys, there, H * K, K).to(operand)
        x = -tl.dot(ww, s.to(operand), input_precision=PRECISION)
        if u is not None:
            x += load_rows(u + base * V, rows, values, there, H * V, V)
        if x_out is not None:
            store_rows(x_out + base * V, rows, values, there, H * V, x, V)
        kk = load_rows(ks + base * K, rows, keys, there, H * K, K).to(operand)
        decay = tl.load(decays + state_at(b, chunk, chunks, h, H, K) + keys, mask=keys < K, other=0.0)
        s = decay[:, None] * s + tl.dot(tl.trans(kk), x.to(operand), input_precision=PRECISION)
    store_state(final + state_at(b, p, segments, h, H, K * V), keys, values, s, K, V)


@triton.jit(do_not_specialize=SIZES)
def output_kernel(
    qs, a, x, states, begins, counts, out,
    tokens, chunks,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Outputs of one chunk, head and block of columns; grid (N, B H, blocks of V)."""
    chunk, values = tl.program_id(0), tl.program_id(2) * BV + tl.arange(0, BV)
    b, h, base, _, count = locate(begins, counts, tokens, chunk, H)
    rows = tl.arange(0, C)
    there = rows < count
    aa = load_rows(a + base * C, rows, rows, there, H * C, C)
    xx = load_rows(x + base * V, rows, values, there, H * V, V)
    o = tl.dot(aa, xx, input_precision=PRECISION)
    for first in range(0, K, BK):
        keys = first + tl.arange(0, BK)
        qq = load_rows(qs + base * K, rows, keys, there, H * K, K)
        s = load_state(states + state_at(b, chunk, chunks, h, H, K * V), keys, values, K, V)
        o += tl.dot(qq, s, input_precision=PRECISION)
    store_rows(out + base * V, rows, values, there, H * V, o, V)


@triton.jit(do_not_specialize=SIZES)
def scan_backward_kernel(
    qs, a, ks, w, decays, dout, dfinal, begins, counts, bounds,
    dstates, dx_out, dinitial,
    tokens, chunks, segments,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of states, last chunk first; grid (B P H, blocks of V); BK >= K.

    dout [B, T, H, V], None = 0 (then qs and a are not read); dfinal, dinitial [B, P, H, K, V] float32, dinitial None =
    not wanted; dstates [B, N, H, K, V]: E' of each chunk; dx_out [B, T, H, V], the gradient of U too.
    """
    program, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BV
    h, p, b = program % H, program // H % segments, program // H // segments
    rows, keys, values = tl.arange(0, C), tl.arange(0, BK), column + tl.arange(0, BV)
    operand = tl.float32 if WIDE else w.dtype.element_ty

    e = load_state(dfinal + state_at(b, p, segments, h, H, K * V), keys, values, K, V)
    first, end = tl.load(bounds + p), tl.load(bounds + p + 1)
    for done in range(end - first):
        chunk = end - 1 - done
        begin, count = tl.load(begins + chunk), tl.load(counts + chunk)
        base, there = (b * tokens + begin) * H + h, rows < count
        store_state(dstates + state_at(b, chunk, chunks, h, H, K * V), keys, values, e, K, V)
        kk = load_rows(ks + base * K, rows, keys, there, H * K, K).to(operand)
        ww = load_rows(w + base * K, rows, keys, there, H * K, K).to(operand)
        decay = tl.load(decays + state_at(b, chunk, chunks, h, H, K) + keys, mask=keys < K, other=0.0)
        dx = tl.dot(kk, e.to(operand), input_precision=PRECISION)
        e = decay[:, None] * e
        if dout is not None:
            do = load_rows(dout + base * V, rows, values, there, H * V, V)
            aa = load_rows(a + base * C, rows, rows, there, H * C, C)
            qq = load_rows(qs + base * K, rows, keys, there, H * K, K)
            dx += tl.dot(tl.trans(aa), do, input_precision=PRECISION)
            e += tl.dot(tl.trans(qq), do, input_precision=PRECISION)
        store_rows(dx_out + base * V, rows, values, there, H * V, dx, V)
        e -= tl.dot(tl.trans(ww), dx.to(operand), input_precision=PRECISION)
    if dinitial is not None:
        store_state(dinitial + state_at(b, p, segments, h, H, K * V), keys, values, e, K, V)


@triton.jit(do_not_specialize=SIZES)
def factors_gradient_kernel(
    x, dx, states, dstates, dout, begins, counts,
    dqs, da, dks, dw, ddecays,
    tokens, chunks,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ, dA, dK, dW and dD of one chunk, head and block of key dims; grid (N, B H, blocks of K).

    dout None = 0: then dqs and da are not written. da is that of all pairs of a chunk, whichever A has.
    """
    chunk, first = tl.program_id(0), tl.program_id(2) * BK
    b, h, base, _, count = locate(begins, counts, tokens, chunk, H)
    rows, keys = tl.arange(0, C), first + tl.arange(0, BK)
    there = rows < count
    to_q = tl.zeros([C, BK], tl.float32)
    to_k = tl.zeros([C, BK], tl.float32)
    to_w = tl.zeros([C, BK], tl.float32)
    to_decay = tl.zeros([BK], tl.float32)
    for column in range(0, V, BV):
        values = column + tl.arange(0, BV)
        s = load_state(states + state_at(b, chunk, chunks, h, H, K * V), keys, values, K, V)
        e = load_state(dstates + state_at(b, chunk, chunks, h, H, K * V), keys, values, K, V)
        xx = load_rows(x + base * V, rows, values, there, H * V, V)
        dxx = load_rows(dx + base * V, rows, values, there, H * V, V)
        to_decay += tl.sum(s.to(tl.float32) * e.to(tl.float32), axis=1)
        to_k += tl.dot(xx, tl.trans(e), input_precision=PRECISION)
        to_w -= tl.dot(dxx, tl.trans(s), input_precision=PRECISION)
        if dout is not None:
            do = load_rows(dout + base * V, rows, values, there, H * V, V)
            to_q += tl.dot(do, tl.trans(s), input_precision=PRECISION)
    store_rows(dks + base * K, rows, keys, there, H * K, to_k, K)
    store_rows(dw + base * K, rows, keys, there, H * K, to_w, K)
    tl.store(ddecays + state_at(b, chunk, chunks, h, H, K) + keys, to_decay, mask=keys < K)
    if dout is not None:
        store_rows(dqs + base * K, rows, keys, there, H * K, to_q, K)
        if first == 0:  # one of the blocks of key dims has this to do too
            to_a = tl.zeros([C, C], tl.float32)
            for column in range(0, V, BV):
                values = column + tl.arange(0, BV)
                do = load_rows(dout + base * V, rows, values, there, H * V, V)
                xx = load_rows(x + base * V, rows, values, there, H * V, V)
                to_a += tl.dot(do, tl.trans(xx), input_precision=PRECISION)
            store_rows(da + base * C, rows, rows, there, H * C, to_a, C)
