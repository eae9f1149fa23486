"""Kernels of the backward pass: gradients of q, k, v and of the gates; each is written by exactly one program.

With ds_ij = dout_i . v_j for visible pairs, P_i the decay from before the chunk to i and Q_j that from j to its end,

    dq_i = scale (sum_j ds_ij e_ij k_j + P_i S dout_i)      dk_j = scale sum_i ds_ij e_ij q_i + Q_j dR v_j
    dv_j = scale sum_i (q_i e_ij k_j) dout_i + Q_j dR^T k_j

The gate of token t scales everything that passes from before t to t or later. Per head its gradient is added up from
just these terms: w_ij = ds_ij e_ij (q_i . k_j) over j < t <= i, what comes from the entering state at i >= t, and what
j < t gives to the leaving state. Per key dim that would be a product per dim and pair. There the gradient of the sum of
gates up to a token is taken, q dq - k dk, which has the pairs on one side of t as well; they cancel.
`chunk_forward.py` says how tensors are laid out.
"""

import triton
import triton.language as tl

from longctx.kernels.linear.triton.chunk_forward import locate
from longctx.kernels.linear.triton.decay import (
    decay_from_begin,
    decay_to_end,
    decay_to_last,
    diagonal_columns,
    diagonal_rows,
    diagonal_scores,
    load_gates,
    load_sums,
    pair_decay,
)
from longctx.kernels.linear.triton.device import load_rows, load_state, of_document, same_document, store_rows


@triton.jit(do_not_specialize=["tokens", "chunks"])
def dq_kernel(
    q, k, v, gates, states, dout, documents, entering, begins, counts, dq, dgates,
    scale, tokens, chunks, document_rows, rows_of_all,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, GATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write dq, and q's part of the gates' gradient.

    dgates: for `scalar` `[blocks of K, B, T, H]`, to be summed over blocks; for `diagonal` `[B, T, H, K]`.
    rows_of_all = B T H.
    """
    key_blocks: tl.constexpr = (K + BK - 1) // BK
    block, chunk = tl.program_id(0) % key_blocks, tl.program_id(0) // key_blocks
    row, head, first, begin, count = locate(begins, counts, tokens, chunk, H)
    rows = tl.arange(0, C)
    keys = block * BK + tl.arange(0, BK)
    inside = rows < count
    states += ((row * chunks + chunk) * H + head) * K * V
    ds = tl.zeros((C, C), tl.float32)
    acc = tl.zeros((C, BK), tl.float32)
    for value in range(0, V, BV):
        values = value + tl.arange(0, BV)
        douts = load_rows(dout + first * V, rows, values, inside, H * V, V)
        vs = load_rows(v + first * V, rows, values, inside, H * V, V)
        ds += tl.dot(douts, tl.trans(vs), input_precision=PRECISION)
        state = load_state(states, keys, values, K, V).to(q.dtype.element_ty)
        acc += tl.dot(douts, tl.trans(state), input_precision=PRECISION)
    of_row = documents
    if documents is not None:
        of_row = documents + row % document_rows * tokens
        document = tl.load(entering + row % document_rows * chunks + chunk)
        acc = tl.where(of_document(of_row, begin, rows, document, count)[:, None], acc, 0.0)
    visible = same_document(of_row, begin, rows, rows, count) & (rows[:, None] >= rows[None, :])
    ks = load_rows(k + first * K, rows, keys, inside, H * K, K)
    if GATE == "diagonal":
        own, _ = load_gates(gates + first * K, rows, keys, count, H * K, K)
        acc *= decay_from_begin(own, C, BK, C)
        acc += diagonal_rows(tl.where(visible, ds, 0.0), ks, own, C, LEVELS, PRECISION)
    else:
        ds = tl.where(visible, ds, 0.0)
        if GATE == "scalar":
            high, low = load_sums(gates + first, rows, count, H)
            acc *= tl.exp(high)[:, None]
            ds *= pair_decay(high, low, visible)
            qs = load_rows(q + first * K, rows, keys, inside, H * K, K)
            from_state = tl.sum(acc * qs, axis=1)
            passed = tl.cumsum(ds * tl.dot(qs, tl.trans(ks), input_precision=PRECISION), axis=0, reverse=True)
            rest = tl.sum(tl.where(rows[:, None] > rows[None, :], passed, 0.0), axis=1)
            rest = (rest + tl.cumsum(from_state, axis=0, reverse=True)) * scale
            tl.store(dgates + block.to(tl.int64) * rows_of_all + first + rows * H, rest, mask=inside)
        acc += tl.dot(ds.to(k.dtype.element_ty), ks, input_precision=PRECISION)
    acc *= scale
    store_rows(dq + first * K, rows, keys, inside, H * K, acc, K)
    if GATE == "diagonal":
        product = acc * load_rows(q + first * K, rows, keys, inside, H * K, K)
        rest = tl.cumsum(product, axis=0, reverse=True)
        store_rows(dgates + first * K, rows, keys, inside, H * K, rest, K)


@triton.jit(do_not_specialize=["tokens", "chunks"])
def dk_kernel(
    q, k, v, gates, dstates, dtotals, dout, documents, begins, counts, dk, dgates,
    scale, tokens, chunks, document_rows, rows_of_all,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, GATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write dk, and k's part of the gates' gradient (as `dq_kernel` does q's).

    dstates `[B, N, H, K, V]` is the gradient of R, dtotals `[B, N, H, K]` (diagonal) that of the sums of gates.
    """
    key_blocks: tl.constexpr = (K + BK - 1) // BK
    block, chunk = tl.program_id(0) % key_blocks, tl.program_id(0) // key_blocks
    row, head, first, begin, count = locate(begins, counts, tokens, chunk, H)
    rows = tl.arange(0, C)
    keys = block * BK + tl.arange(0, BK)
    inside = rows < count
    state = (row * chunks + chunk) * H + head
    ds = tl.zeros((C, C), tl.float32)
    acc = tl.zeros((C, BK), tl.float32)
    for value in range(0, V, BV):
        values = value + tl.arange(0, BV)
        douts = load_rows(dout + first * V, rows, values, inside, H * V, V)
        vs = load_rows(v + first * V, rows, values, inside, H * V, V)
        ds += tl.dot(douts, tl.trans(vs), input_precision=PRECISION)
        dstate = load_state(dstates + state * K * V, keys, values, K, V).to(q.dtype.element_ty)
        acc += tl.dot(vs, tl.trans(dstate), input_precision=PRECISION)
    of_row = documents
    leaving = inside
    if documents is not None:
        of_row = documents + row % document_rows * tokens
        leaving = of_document(of_row, begin, rows, tl.load(of_row + begin + count - 1), count)
        acc = tl.where(leaving[:, None], acc, 0.0)
    visible = same_document(of_row, begin, rows, rows, count) & (rows[:, None] >= rows[None, :])
    ds = tl.where(visible, ds, 0.0)
    qs = load_rows(q + first * K, rows, keys, inside, H * K, K)
    if GATE == "none":
        acc += tl.dot(tl.trans(ds.to(q.dtype.element_ty)), qs, input_precision=PRECISION) * scale
    else:
        ks = load_rows(k + first * K, rows, keys, inside, H * K, K).to(tl.float32)
        if GATE == "scalar":
            high, low = load_sums(gates + first, rows, count, H)
            acc *= decay_to_last(gates + first, high, low, leaving, count, H)[:, None]
            to_state = tl.sum(acc * ks, axis=1)
            earlier = tl.cumsum(to_state, axis=0) - to_state
            tl.store(dgates + block.to(tl.int64) * rows_of_all + first + rows * H, earlier, mask=inside)
            ds *= pair_decay(high, low, visible)
            acc += tl.dot(tl.trans(ds.to(q.dtype.element_ty)), qs, input_precision=PRECISION) * scale
        else:
            own, following = load_gates(gates + first * K, rows, keys, count, H * K, K)
            acc *= decay_to_end(following, C, BK, C)
            of_total = tl.load(dtotals + state * K + keys, mask=keys < K, other=0.0).to(tl.float32)
            to_last = tl.sum(acc * ks, axis=0) + of_total
            acc += diagonal_columns(ds, qs, own, C, LEVELS, PRECISION) * scale
            rest = to_last[None, :] - tl.cumsum(acc * ks, axis=0, reverse=True)
            store_rows(dgates + first * K, rows, keys, inside, H * K, rest, K)
    store_rows(dk + first * K, rows, keys, inside, H * K, acc, K)


@triton.jit(do_not_specialize=["tokens", "chunks"])
def dv_kernel(
    q, k, gates, dstates, dout, documents, begins, counts, dv, scale, tokens, chunks, document_rows,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, GATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write dv."""
    value_blocks: tl.constexpr = (V + BV - 1) // BV
    chunk = tl.program_id(0) // value_blocks
    row, head, first, begin, count = locate(begins, counts, tokens, chunk, H)
    rows = tl.arange(0, C)
    values = tl.program_id(0) % value_blocks * BV + tl.arange(0, BV)
    inside = rows < count
    dstates += ((row * chunks + chunk) * H + head) * K * V
    scores = tl.zeros((C, C), tl.float32)
    acc = tl.zeros((C, BV), tl.float32)
    for key in range(0, K, BK):
        keys = key + tl.arange(0, BK)
        qs = load_rows(q + first * K, rows, keys, inside, H * K, K)
        ks = load_rows(k + first * K, rows, keys, inside, H * K, K)
        if GATE == "diagonal":
            own, following = load_gates(gates + first * K, rows, keys, count, H * K, K)
            scores += diagonal_scores(qs, ks, own, C, LEVELS, PRECISION)
            ks = (ks * decay_to_end(following, C, BK, C)).to(k.dtype.element_ty)
        else:
            scores += tl.dot(qs, tl.trans(ks), input_precision=PRECISION)
        dstate = load_state(dstates, keys, values, K, V).to(q.dtype.element_ty)
        acc += tl.dot(ks, dstate, input_precision=PRECISION)
    of_row = documents
    leaving = inside
    if documents is not None:
        of_row = documents + row % document_rows * tokens
        leaving = of_document(of_row, begin, rows, tl.load(of_row + begin + count - 1), count)
        acc = tl.where(leaving[:, None], acc, 0.0)
    visible = same_document(of_row, begin, rows, rows, count) & (rows[:, None] >= rows[None, :])
    if GATE == "scalar":
        high, low = load_sums(gates + first, rows, count, H)
        acc *= decay_to_last(gates + first, high, low, leaving, count, H)[:, None]
        scores *= pair_decay(high, low, visible)
    scores = (tl.where(visible, scores, 0.0) * scale).to(q.dtype.element_ty)
    douts = load_rows(dout + first * V, rows, values, inside, H * V, V)
    acc += tl.dot(tl.trans(scores), douts, input_precision=PRECISION)
    store_rows(dv + first * V, rows, values, inside, H * V, acc, V)
