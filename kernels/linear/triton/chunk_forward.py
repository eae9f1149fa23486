"""Kernels of the forward pass: what a chunk adds to a state, and the outputs from the states that enter chunks.

All tensors are contiguous: q, k `[B, T, H, K]`, v `[B, T, H, V]`, states `[B, N, H, K, V]` float32; `gates` is None,
for `scalar` the running sums inside of chunks `[B, T, H]` in float64, for `diagonal` the gates `[B, T, H, K]`, float32.
Grids are (blocks of one chunk * N, B * H). A chunk is C rows, a power of two, of which `count` are tokens.
"""

import triton
import triton.language as tl

from longctx.kernels.linear.triton.decay import (
    decay_from_begin,
    decay_to_end,
    decay_to_last,
    diagonal_scores,
    load_gates,
    load_sums,
    pair_decay,
)
from longctx.kernels.linear.triton.device import (
    load_rows,
    load_state,
    of_document,
    same_document,
    store_rows,
    store_state,
)


@triton.jit
def locate(begins, counts, tokens, chunk, H: tl.constexpr):
    """Return row, head, first row of the chunk in `[B T H]` as int64, its first token and how many it has."""
    row, head = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    begin, count = tl.load(begins + chunk), tl.load(counts + chunk)
    return row, head, (row * tokens + begin) * H + head, begin, count


@triton.jit(do_not_specialize=["tokens", "chunks"])
def outer_kernel(
    x, y, gates, documents, entering, begins, counts, result, totals, scale, tokens, chunks, document_rows,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    GATE: tl.constexpr, SIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write scale * sum_t w_t x_t y_t^T of every chunk to `result` `[B, N, H, K, V]`.

    SIDE `end`: w_t is the decay from t to the chunk's last token, of tokens of its document: x = k, y = v give R. For
    `diagonal` also the chunk's sums of gates to `totals` `[B, N, H, K]`, float64. SIDE `begin`: w_t is the decay from
    before the chunk to t, of tokens of the entering document: x = q, y = dout give the gradient of the entering state.
    """
    key_blocks: tl.constexpr = (K + BK - 1) // BK
    value_blocks: tl.constexpr = (V + BV - 1) // BV
    block = tl.program_id(0) % (key_blocks * value_blocks)
    chunk = tl.program_id(0) // (key_blocks * value_blocks)
    row, head, first, begin, count = locate(begins, counts, tokens, chunk, H)
    rows = tl.arange(0, C)
    keys, values = block // value_blocks * BK + tl.arange(0, BK), block % value_blocks * BV + tl.arange(0, BV)
    state = (row * chunks + chunk) * H + head
    keep = rows < count
    if documents is not None:
        of_row = documents + row % document_rows * tokens
        if SIDE == "end":
            document = tl.load(of_row + begin + count - 1)
        else:
            document = tl.load(entering + row % document_rows * chunks + chunk)
        keep = of_document(of_row, begin, rows, document, count)
    xs = load_rows(x + first * K, rows, keys, keep, H * K, K)
    ys = load_rows(y + first * V, rows, values, rows < count, H * V, V)
    if GATE == "scalar":
        high, low = load_sums(gates + first, rows, count, H)
        if SIDE == "end":
            weight = decay_to_last(gates + first, high, low, keep, count, H)
        else:
            weight = tl.exp(high)
        xs = (xs * weight[:, None]).to(x.dtype.element_ty)
    if GATE == "diagonal":
        own, following = load_gates(gates + first * K, rows, keys, count, H * K, K)
        if SIDE == "end":
            xs = (xs * decay_to_end(following, C, BK, C)).to(x.dtype.element_ty)
            if block % value_blocks == 0:
                tl.store(totals + state * K + keys, tl.sum(own.to(tl.float64), axis=0), mask=keys < K)
        else:
            xs = (xs * decay_from_begin(own, C, BK, C)).to(x.dtype.element_ty)
    made = tl.dot(tl.trans(xs), ys, input_precision=PRECISION) * scale
    store_state(result + state * K * V, keys, values, made, K, V)


@triton.jit(do_not_specialize=["tokens", "chunks"])
def out_kernel(
    q, k, v, gates, states, documents, entering, begins, counts, out, scale, tokens, chunks, document_rows,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, GATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write out `[B, T, H, V]`, a block of values of one chunk at a time, from the states that enter chunks."""
    value_blocks: tl.constexpr = (V + BV - 1) // BV
    chunk = tl.program_id(0) // value_blocks
    row, head, first, begin, count = locate(begins, counts, tokens, chunk, H)
    rows = tl.arange(0, C)
    values = tl.program_id(0) % value_blocks * BV + tl.arange(0, BV)
    inside = rows < count
    states += ((row * chunks + chunk) * H + head) * K * V
    scores = tl.zeros((C, C), tl.float32)
    acc = tl.zeros((C, BV), tl.float32)
    for key in range(0, K, BK):
        keys = key + tl.arange(0, BK)
        qs = load_rows(q + first * K, rows, keys, inside, H * K, K)
        ks = load_rows(k + first * K, rows, keys, inside, H * K, K)
        if GATE == "diagonal":
            own, _ = load_gates(gates + first * K, rows, keys, count, H * K, K)
            scores += diagonal_scores(qs, ks, own, C, LEVELS, PRECISION)
            qs = (qs * decay_from_begin(own, C, BK, C)).to(q.dtype.element_ty)
        else:
            scores += tl.dot(qs, tl.trans(ks), input_precision=PRECISION)
        state = load_state(states, keys, values, K, V).to(q.dtype.element_ty)
        acc += tl.dot(qs, state, input_precision=PRECISION)
    of_row = documents
    if documents is not None:
        of_row = documents + row % document_rows * tokens
        document = tl.load(entering + row % document_rows * chunks + chunk)
        acc = tl.where(of_document(of_row, begin, rows, document, count)[:, None], acc, 0.0)
    visible = same_document(of_row, begin, rows, rows, count) & (rows[:, None] >= rows[None, :])
    if GATE == "scalar":
        high, low = load_sums(gates + first, rows, count, H)
        acc *= tl.exp(high)[:, None]
        scores *= pair_decay(high, low, visible)
    scores = tl.where(visible, scores, 0.0).to(v.dtype.element_ty)
    acc += tl.dot(scores, load_rows(v + first * V, rows, values, inside, H * V, V), input_precision=PRECISION)
    store_rows(out + first * V, rows, values, inside, H * V, acc * scale, V)
