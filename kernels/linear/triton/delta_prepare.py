"""The delta rule of a chunk, freed of gates, betas and documents: what it does to a state.

With G the cumulative log decays inside of a chunk, i and j tokens of one document, e_ij = exp(G_i - G_j):

    L_ij = b_i k_i . (e_ij k_j), i > j         A_ij = scale q_i . (e_ij k_j), i >= j
    T = (1 + L)^-1    U = T (b v)    W = T (b k exp G)
    Q = scale q exp G    K = k exp(G_last - G)    D = exp G_last

(WY and UT transform: arXiv 2406.06484, 2412.06464, 2510.26692.) Then, with S the state that enters the chunk,

    x = U - W S    out = Q S + A x    S' = D S + K^T x

Two things are done by halving. Diagonal decays: the pairs of a chunk whose tokens are in different halves of a block of
2 s tokens, s = 1, 2 ... C / 2, have all their decays split at the block's middle m, exp(G_i - G_m) exp(G_m - G_j): one
product of matrices for each s, and no exponent is above 0. And the inverse: of blocks of 2 s from those of s,
T <- T - T L_s T with L_s the part of L between halves, which is as stable as substitution.
"""

import triton
import triton.language as tl

from longctx.kernels.linear.triton.chunk_forward import locate
from longctx.kernels.linear.triton.decay import load_sums, pair_decay
from longctx.kernels.linear.triton.delta_tiles import between_halves, boundary_decays, middle_decays
from longctx.kernels.linear.triton.device import load_rows, same_document, store_rows

# Counts that differ from call to call: one binary for all of them.
SIZES = ["tokens", "chunks"]


@triton.jit(do_not_specialize=SIZES)
def scores_kernel(
    q, k, gates, beta, documents, begins, counts,
    a_out, t_out,
    scale, tokens, document_rows,
    H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, LEVELS: tl.constexpr,
    GATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A and T of one chunk and head; grid (chunks, B H).

    q, k [B, T, H, K]; gates [B, T, H] or [B, T, H, K] float32 or None; beta [B, T, H]; documents [R, T] or None; a_out,
    t_out [B, T, H, C], float32 for T. GATE: "none", "scalar" or "diagonal". LEVELS = log2 C.
    """
    chunk = tl.program_id(0)
    b, _, base, begin, count = locate(begins, counts, tokens, chunk, H)
    if documents is not None:
        documents += b % document_rows * tokens
    rows = tl.arange(0, C)
    i, j, there = rows[:, None], rows[None, :], rows < count

    a = tl.zeros([C, C], tl.float32)
    low = tl.zeros([C, C], tl.float32)
    for first in range(0, K, BK):
        dims = first + tl.arange(0, BK)
        qq = load_rows(q + base * K, rows, dims, there, H * K, K)
        kk = load_rows(k + base * K, rows, dims, there, H * K, K)
        if GATE == "diagonal":
            own = load_rows(gates + base * K, rows, dims, there, H * K, K)
            a += tl.where(i == j, tl.sum(qq.to(tl.float32) * kk.to(tl.float32), axis=1)[:, None], 0.0)
            for level in range(LEVELS):
                decay = middle_decays(own, level, C, q.dtype.element_ty == tl.float32, PRECISION)
                pairs = between_halves(level, C)
                qd, kd = (qq * decay).to(q.dtype.element_ty), (kk * decay).to(q.dtype.element_ty)
                a += tl.where(pairs, tl.dot(qd, tl.trans(kd), input_precision=PRECISION), 0.0)
                low += tl.where(pairs, tl.dot(kd, tl.trans(kd), input_precision=PRECISION), 0.0)
        else:
            a += tl.dot(qq, tl.trans(kk), input_precision=PRECISION)
            low += tl.dot(kk, tl.trans(kk), input_precision=PRECISION)
    if GATE == "scalar":
        high, rest = load_sums(gates + base, rows, count, H)
        decay = pair_decay(high, rest, (i >= j) & there[:, None])
        a *= decay
        low *= decay
    same = same_document(documents, begin, rows, rows, count)
    a = tl.where((i >= j) & same, scale * a, 0.0)
    store_rows(a_out + base * C, rows, rows, there, H * C, a, C)

    b_i = tl.load(beta + base + rows * H, mask=there, other=0.0).to(tl.float32)
    low = tl.where((i > j) & same, low * b_i[:, None], 0.0)
    t = tl.where(i == j, 1.0, 0.0)
    for level in range(LEVELS):
        part = tl.where(between_halves(level, C), low, 0.0)
        t -= tl.dot(t, tl.dot(part, t, input_precision=PRECISION), input_precision=PRECISION)
    store_rows(t_out + base * C, rows, rows, there, H * C, t, C)


@triton.jit(do_not_specialize=SIZES)
def factors_kernel(
    q, k, v, gates, beta, documents, entering, begins, counts, t_in,
    qs, ks, w, u, decays,
    scale, tokens, chunks, document_rows,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    GATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Q, K, W, U and D of one of N chunks and head; grid (N, B H).

    v [B, T, H, V]; entering [R, N]; qs, ks, w [B, T, H, K] and u [B, T, H, V] in q's dtype; decays [B, N, H, K]
    float32.
    """
    chunk = tl.program_id(0)
    b, h, base, begin, count = locate(begins, counts, tokens, chunk, H)
    if documents is not None:
        documents += b % document_rows * tokens
        entering += b % document_rows * chunks + chunk
    rows = tl.arange(0, C)
    there = rows < count
    operand = q.dtype.element_ty
    # T b is rounded once; T and b v would be twice.
    b_j = tl.load(beta + base + rows * H, mask=there, other=0.0).to(tl.float32)[None, :]
    tb = (load_rows(t_in + base * C, rows, rows, there, H * C, C) * b_j).to(operand)

    for first in range(0, K, BK):
        dims = first + tl.arange(0, BK)
        qq = load_rows(q + base * K, rows, dims, there, H * K, K)
        kk = load_rows(k + base * K, rows, dims, there, H * K, K)
        into, out, total = boundary_decays(
            gates, documents, entering, base, begin, rows, dims, count, H, K, C, BK, GATE
        )
        store_rows(qs + base * K, rows, dims, there, H * K, scale * into * qq, K)
        store_rows(ks + base * K, rows, dims, there, H * K, out * kk, K)
        tl.store(decays + ((b * chunks + chunk) * H + h) * K + dims, total, mask=dims < K)
        ww = tl.dot(tb, (into * kk).to(operand), input_precision=PRECISION)
        store_rows(w + base * K, rows, dims, there, H * K, ww, K)
    for first in range(0, V, BV):
        dims = first + tl.arange(0, BV)
        vv = load_rows(v + base * V, rows, dims, there, H * V, V)
        uu = tl.dot(tb, vv, input_precision=PRECISION)
        store_rows(u + base * V, rows, dims, there, H * V, uu, V)
