"""Decays as the kernels of the delta rule need them: over the bounds of a chunk, and from the middles of its blocks."""

import triton
import triton.language as tl

from longctx.kernels.linear.triton.decay import (
    decay_from_begin,
    decay_to_end,
    decay_to_last,
    load_gates,
    load_sums,
)
from longctx.kernels.linear.triton.device import exp_where, of_document


@triton.jit
def boundary_decays(
    gates, documents, entering, base, begin, rows, keys, count,
    H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """Return three decays, 0 where a document begins in between, or where there is no token.

    `into` [C, BK or 1]: from before the chunk to each token; `out` [C, BK or 1]: from each token to the chunk's last
    one; `total` [BK]: from before the chunk to its last token. `documents` points to the row's first token, `entering`
    to the document of the entering state; both may be None.
    """
    enters, leaves, stays = rows < count, rows < count, keys < K
    if documents is not None:
        before, last = tl.load(entering), tl.load(documents + begin + count - 1)
        enters = of_document(documents, begin, rows, before, count)
        leaves = of_document(documents, begin, rows, last, count)
        stays &= before == last
    if GATE == "diagonal":
        own, following = load_gates(gates + base * K, rows, keys, count, H * K, K)
        into = tl.where(enters[:, None], decay_from_begin(own, C, BK, C), 0.0)
        out = tl.where(leaves[:, None], decay_to_end(following, C, BK, C), 0.0)
        total = exp_where(stays, tl.sum(own, axis=0))
    elif GATE == "scalar":
        high, low = load_sums(gates + base, rows, count, H)
        into = exp_where(enters, high)[:, None]
        out = decay_to_last(gates + base, high, low, leaves, count, H)[:, None]
        last_high, _ = load_sums(gates + base, count - 1, count, H)
        total = exp_where(stays, last_high)
    else:
        into = tl.where(enters, 1.0, 0.0)[:, None]
        out = tl.where(leaves, 1.0, 0.0)[:, None]
        total = tl.where(stays, 1.0, 0.0)
    return into, out, total


@triton.jit
def middle_decays(own, level, C: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr):
    """Return the decays [C, BK] between each token and the middle of its aligned block of 2 s tokens, s = 2^level.

    Of a token in the second half: from the middle to it; in the first half: from it to the middle. The gates between
    are added up by a product with zeros and ones: no sum is a difference of others, and kernels can loop over levels.
    Unless WIDE, gates count with 16 binary digits: then no decay is off by more than 2^-18.
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
def between_halves(level, C: tl.constexpr):
    """Return the pairs (i, j) [C, C] with i in the second and j in the first half of one aligned block of 2 s tokens.

    Over all levels every pair i > j is among exactly one of these.
    """
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    return (i > j) & (((i ^ j) >> level) == 1)
