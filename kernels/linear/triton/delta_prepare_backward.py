"""Gradients of the delta rule's factors with respect to q, k, v, beta and the gates; see `delta_prepare.py`.

With X = (b v, b k exp G) and (U, W) = T X: dX = T^T d(U, W), dT = d(U, W) X^T and dL = -T^T dT T^T below the diagonal.
The gate of token t decays everything that passes from before t to t or later. Per head its gradient is added up from
just these terms. Per key dim that would be a product per dim and pair: there it is the sum over the rest of the chunk
of what multiplies cumulative gates, as q dq - k dk, in which pairs on one side of t cancel.
"""

import triton
import triton.language as tl

from longctx.kernels.linear.triton.chunk_forward import locate
from longctx.kernels.linear.triton.decay import load_sums, pair_decay
from longctx.kernels.linear.triton.delta_prepare import SIZES
from longctx.kernels.linear.triton.delta_tiles import between_halves, boundary_decays, middle_decays
from longctx.kernels.linear.triton.device import load_rows, same_document, store_rows


@triton.jit(do_not_specialize=SIZES)
def solve_backward_kernel(
    k, v, gates, beta, documents, entering, begins, counts, t_in, dw, du,
    dv, dbeta, dlow_out,
    tokens, chunks, document_rows,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    GATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dv, dL, and what v contributes to dbeta, of one chunk and head; grid (N, B H).

    dw [B, T, H, K]; du [B, T, H, V]; dv like v; dbeta [B, T, H] and dlow_out [B, T, H, C] float32.
    """
    chunk = tl.program_id(0)
    b, _, base, begin, count = locate(begins, counts, tokens, chunk, H)
    if documents is not None:
        documents += b % document_rows * tokens
        entering += b % document_rows * chunks + chunk
    rows = tl.arange(0, C)
    there = rows < count
    operand = k.dtype.element_ty
    b_i = tl.load(beta + base + rows * H, mask=there, other=0.0).to(tl.float32)[:, None]
    t = load_rows(t_in + base * C, rows, rows, there, H * C, C)

    dt = tl.zeros([C, C], tl.float32)
    db = tl.zeros([C], tl.float32)
    for first in range(0, V, BV):
        dims = first + tl.arange(0, BV)
        vv = load_rows(v + base * V, rows, dims, there, H * V, V)
        duu = load_rows(du + base * V, rows, dims, there, H * V, V)
        dx = tl.dot(tl.trans(t).to(operand), duu, input_precision=PRECISION)
        db += tl.sum(dx * vv, axis=1)
        store_rows(dv + base * V, rows, dims, there, H * V, b_i * dx, V)
        dt += tl.dot(duu, tl.trans((b_i * vv).to(operand)), input_precision=PRECISION)
    for first in range(0, K, BK):
        dims = first + tl.arange(0, BK)
        kk = load_rows(k + base * K, rows, dims, there, H * K, K)
        dww = load_rows(dw + base * K, rows, dims, there, H * K, K)
        into, _out, _total = boundary_decays(
            gates, documents, entering, base, begin, rows, dims, count, H, K, C, BK, GATE
        )
        dt += tl.dot(dww, tl.trans((b_i * into * kk).to(operand)), input_precision=PRECISION)
    tl.store(dbeta + base + rows * H, db, mask=there)
    dlow = tl.dot(tl.trans(t), tl.dot(dt, tl.trans(t), input_precision=PRECISION), input_precision=PRECISION)
    pairs = (rows[:, None] > rows[None, :]) & same_document(documents, begin, rows, rows, count)
    store_rows(dlow_out + base * C, rows, rows, there, H * C, tl.where(pairs, -dlow, 0.0), C)


@triton.jit(do_not_specialize=SIZES)
def scores_backward_kernel(
    q, k, gates, beta, documents, entering, begins, counts, t_in, da_in, dlow_in, dqs, dks, dw, ddecays, dbeta_of_v,
    dq, dk, dbeta, dg,
    scale, tokens, chunks, document_rows,
    H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, LEVELS: tl.constexpr,
    GATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, dk, dbeta and dg of one chunk and head; grid (N, B H).

    da_in, dlow_in [B, T, H, C]; dqs, dks, dw [B, T, H, K]; ddecays [B, N, H, K]; dbeta_of_v [B, T, H]; dq, dk, dbeta,
    dg like q, k, beta, gates.
    """
    chunk = tl.program_id(0)
    b, h, base, begin, count = locate(begins, counts, tokens, chunk, H)
    if documents is not None:
        documents += b % document_rows * tokens
        entering += b % document_rows * chunks + chunk
    rows = tl.arange(0, C)
    i, j, there = rows[:, None], rows[None, :], rows < count
    operand = q.dtype.element_ty
    b_i = tl.load(beta + base + rows * H, mask=there, other=0.0).to(tl.float32)[:, None]
    t = load_rows(t_in + base * C, rows, rows, there, H * C, C).to(operand)
    da = load_rows(da_in + base * C, rows, rows, there, H * C, C).to(tl.float32)
    da = tl.where((i >= j) & same_document(documents, begin, rows, rows, count), scale * da, 0.0)
    dlow = load_rows(dlow_in + base * C, rows, rows, there, H * C, C)
    if GATE == "scalar":
        high, rest = load_sums(gates + base, rows, count, H)
        decay = pair_decay(high, rest, (i >= j) & there[:, None])
        da *= decay
        dlow *= decay
    da, dlow = da.to(operand), dlow.to(operand)

    db = tl.load(dbeta_of_v + base + rows * H, mask=there, other=0.0)
    if GATE == "scalar":
        qk = tl.zeros([C, C], tl.float32)
        kk_of_pairs = tl.zeros([C, C], tl.float32)
        from_before = tl.zeros([C], tl.float32)
        to_after = tl.zeros([C], tl.float32)
        through = 0.0
    for first in range(0, K, BK):
        dims = first + tl.arange(0, BK)
        qq = load_rows(q + base * K, rows, dims, there, H * K, K)
        kk = load_rows(k + base * K, rows, dims, there, H * K, K)
        # What pairs give to q_i, to k_i (but for its beta), and to k_j.
        if GATE == "diagonal":
            own = load_rows(gates + base * K, rows, dims, there, H * K, K)
            da_ii = tl.sum(tl.where(i == j, da.to(tl.float32), 0.0), axis=1)[:, None]
            to_q, to_i, to_j = da_ii * kk, tl.zeros([C, BK], tl.float32), da_ii * qq
            for level in range(LEVELS):
                decay = middle_decays(own, level, C, operand == tl.float32, PRECISION)
                pairs = between_halves(level, C)
                qd, kd, bkd = (qq * decay).to(operand), (kk * decay).to(operand), (b_i * kk * decay).to(operand)
                da_s, dlow_s = tl.where(pairs, da, 0.0).to(operand), tl.where(pairs, dlow, 0.0).to(operand)
                to_q += decay * tl.dot(da_s, kd, input_precision=PRECISION)
                to_i += decay * tl.dot(dlow_s, kd, input_precision=PRECISION)
                of_j = tl.dot(tl.trans(da_s), qd, input_precision=PRECISION)
                to_j += decay * tl.dot(tl.trans(dlow_s), bkd, of_j, input_precision=PRECISION)
        else:
            to_q = tl.dot(da, kk, input_precision=PRECISION)
            to_i = tl.dot(dlow, kk, input_precision=PRECISION)
            to_j = tl.dot(tl.trans(da), qq, input_precision=PRECISION)
            to_j += tl.dot(tl.trans(dlow), (b_i * kk).to(operand), input_precision=PRECISION)
        # What comes through Q = scale into q, W = T b into k and K = out k.
        into, out, total = boundary_decays(
            gates, documents, entering, base, begin, rows, dims, count, H, K, C, BK, GATE
        )
        dww = load_rows(dw + base * K, rows, dims, there, H * K, K)
        into_q = scale * into * load_rows(dqs + base * K, rows, dims, there, H * K, K)
        into_i = into * tl.dot(tl.trans(t), dww, input_precision=PRECISION)
        to_q += into_q
        to_i += into_i
        to_last = out * load_rows(dks + base * K, rows, dims, there, H * K, K)
        store_rows(dq + base * K, rows, dims, there, H * K, to_q, K)
        store_rows(dk + base * K, rows, dims, there, H * K, b_i * to_i + to_j + to_last, K)
        db += tl.sum(kk * to_i, axis=1)
        if GATE == "scalar":
            qk += tl.dot(qq, tl.trans(kk), input_precision=PRECISION)
            kk_of_pairs += tl.dot(kk, tl.trans(kk), input_precision=PRECISION)
            from_before += tl.sum(qq * into_q + b_i * kk * into_i, axis=1)
            to_after += tl.sum(kk * to_last, axis=1)
            ddecay = tl.load(ddecays + ((b * chunks + chunk) * H + h) * K + dims, mask=dims < K, other=0.0)
            through += tl.sum(total * ddecay, axis=0)
        if GATE == "diagonal":
            ddecay = tl.load(ddecays + ((b * chunks + chunk) * H + h) * K + dims, mask=dims < K, other=0.0)
            of_last = total * ddecay + tl.sum(kk * to_last, axis=0)
            dgate = qq * to_q + kk * (b_i * to_i - to_j - to_last)
            dgate += tl.where(i == count - 1, of_last[None, :], 0.0)
            store_rows(dg + base * K, rows, dims, there, H * K, tl.cumsum(dgate, axis=0, reverse=True), K)
    if GATE == "scalar":
        pairs = tl.where(i > j, da * qk + b_i * dlow * kk_of_pairs, 0.0)
        to_rest = tl.cumsum(pairs, axis=0, reverse=True)  # from j to t and later
        passed = tl.sum(tl.where(i > j, to_rest + to_after[None, :], 0.0), axis=1)
        passed += tl.cumsum(from_before, axis=0, reverse=True) + through
        tl.store(dg + base + rows * H, passed, mask=there)
    tl.store(dbeta + base + rows * H, db.to(dbeta.dtype.element_ty), mask=there)
