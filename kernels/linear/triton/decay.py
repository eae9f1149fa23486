"""Decays inside of a chunk, as Triton code: only sums of log decays are exponentiated, and these are <= 0.

Between tokens j <= i of a chunk a state decays by e_ij = exp(g_{j+1} + ... + g_i), per head or per key dim.

Per head (`scalar`) the sums come from one running sum per token, in float64 as a pair of float32: the difference of two
sums is then as exact as the sum of the gates between them, however strong those before them are.

Per key dim (`diagonal`) e_ij does not factor into one term of i and one of j that stay within range. It does for all
pairs that lie in different halves of an aligned block of 2 s tokens, s = 1, 2, 4 ... C / 2: from j to the middle of the
block and from there to i. Every pair i > j belongs to exactly one s, so log2(C) products of matrices, each masked to
its pairs, make up the sum (secondary chunks, arXiv 2312.06635 section 4.3, carried to the end). No sum is the
difference of two others: they are added up from the gates block by block.
"""

import triton
import triton.language as tl

from longctx.kernels.linear.triton.device import exp_where


@triton.jit
def load_sums(sums, rows, count, H: tl.constexpr):
    """Load running sums of gates, float64, of one head's chunk as two float32 `[C]` that add up to them."""
    total = tl.load(sums + rows * H, mask=rows < count, other=0.0)
    high = total.to(tl.float32)
    return high, (total - high.to(tl.float64)).to(tl.float32)


@triton.jit
def pair_decay(high, low, mask):
    """Return e_ij `[C, C]` of gates per head where the mask holds, else 0."""
    return exp_where(mask, (high[:, None] - high[None, :]) + (low[:, None] - low[None, :]))


@triton.jit
def decay_to_last(sums, high, low, mask, count, H: tl.constexpr):
    """Return what is left at the chunk's last token of each token's contribution, `[C]`, 0 outside of the mask."""
    last_high, last_low = load_sums(sums, count - 1, count, H)
    return exp_where(mask, (last_high - high) + (last_low - low))


@triton.jit
def load_gates(gates, rows, columns, count, STRIDE: tl.constexpr, COLUMNS: tl.constexpr):
    """Load gates `[C, BK]` of one head's chunk, and those of the tokens after each; 0 outside of the chunk."""
    offsets = rows[:, None] * STRIDE + columns[None, :]
    inside = (columns < COLUMNS)[None, :]
    own = tl.load(gates + offsets, mask=(rows < count)[:, None] & inside, other=0.0)
    following = tl.load(gates + STRIDE + offsets, mask=(rows + 1 < count)[:, None] & inside, other=0.0)
    return own, following


@triton.jit
def decay_from_begin(own, C: tl.constexpr, BK: tl.constexpr, SPAN: tl.constexpr):
    """Return `[C, BK]` the decay from before an aligned block of SPAN tokens to each of its tokens."""
    sums = tl.cumsum(tl.reshape(own, (C // SPAN, SPAN, BK)), axis=1)
    return tl.exp(tl.reshape(sums, (C, BK)))


@triton.jit
def decay_to_end(following, C: tl.constexpr, BK: tl.constexpr, SPAN: tl.constexpr):
    """Return `[C, BK]` the decay from each token of an aligned block of SPAN tokens to its last."""
    crosses = (tl.arange(0, C) + 1) % SPAN == 0
    inside = tl.where(crosses[:, None], 0.0, following)
    sums = tl.cumsum(tl.reshape(inside, (C // SPAN, SPAN, BK)), axis=1, reverse=True)
    return tl.exp(tl.reshape(sums, (C, BK)))


@triton.jit
def decay_to_middle(own, level, C: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr):
    """Return `[C, BK]` the decay between each token and the middle of its aligned block of 2 s tokens, s = 2^level.

    Of a token in the second half: from the middle to it; in the first half: from it to the middle. Gates are added up
    by a product with zeros and ones, so that kernels can loop over levels: unrolled, more spills. Unless WIDE (of
    float32 inputs) gates count with 16 digits, which moves no decay by more than 2^-18.
    """
    i, t = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    second = (i >> level) % 2 == 1
    between = ((i >> level) == (t >> level)) & ((second & (t <= i)) | ((i < t) & (second == 0)))
    if WIDE:
        sums = tl.dot(tl.where(between, 1.0, 0.0), own, input_precision=PRECISION)
    else:
        ones, high = tl.where(between, 1.0, 0.0).to(tl.bfloat16), own.to(tl.bfloat16)
        sums = tl.dot(ones, (own - high).to(tl.bfloat16), tl.dot(ones, high))
    return tl.exp(sums)


@triton.jit
def halves(level, C: tl.constexpr):
    """Return bool `[C, C]`: i in the second half and j in the first half of one aligned block of 2 s tokens."""
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    return (i > j) & (((i ^ j) >> level) == 1)


@triton.jit
def diagonal_scores(q, k, own, C: tl.constexpr, LEVELS: tl.constexpr, PRECISION: tl.constexpr):
    """Return `[C, C]` sum_d q_id e_ijd k_jd for i >= j, else 0."""
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    scores = tl.where(i == j, tl.sum(q.to(tl.float32) * k.to(tl.float32), axis=1)[:, None], 0.0)
    for level in range(LEVELS):
        decay = decay_to_middle(own, level, C, k.dtype == tl.float32, PRECISION)
        late, early = (q * decay).to(q.dtype), (k * decay).to(k.dtype)
        product = tl.dot(late, tl.trans(early), input_precision=PRECISION)
        scores += tl.where(halves(level, C), product, 0.0)
    return scores


@triton.jit
def diagonal_rows(ds, k, own, C: tl.constexpr, LEVELS: tl.constexpr, PRECISION: tl.constexpr):
    """Return `[C, BK]` sum_j ds_ij e_ijd k_jd over j <= i: the gradient of the scores' q."""
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    result = tl.sum(tl.where(i == j, ds, 0.0), axis=1)[:, None] * k
    for level in range(LEVELS):
        decay = decay_to_middle(own, level, C, k.dtype == tl.float32, PRECISION)
        pairs = tl.where(halves(level, C), ds, 0.0).to(k.dtype)
        result += decay * tl.dot(pairs, (k * decay).to(k.dtype), input_precision=PRECISION)
    return result


@triton.jit
def diagonal_columns(ds, q, own, C: tl.constexpr, LEVELS: tl.constexpr, PRECISION: tl.constexpr):
    """Return `[C, BK]` sum_i ds_ij e_ijd q_id over i >= j: the gradient of the scores' k."""
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    result = tl.sum(tl.where(i == j, ds, 0.0), axis=1)[:, None] * q
    for level in range(LEVELS):
        decay = decay_to_middle(own, level, C, q.dtype == tl.float32, PRECISION)
        pairs = tl.where(halves(level, C), ds, 0.0).to(q.dtype)
        result += decay * tl.dot(tl.trans(pairs), (q * decay).to(q.dtype), input_precision=PRECISION)
    return result
