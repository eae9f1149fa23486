"""Small pieces of Triton code that all kernels of linear attention share."""

import triton
import triton.language as tl


@triton.jit
def exp_where(mask, difference):
    """Return exp(difference) where the mask holds, else 0: what is masked is never exponentiated."""
    return tl.exp(tl.where(mask, difference, float("-inf")))


@triton.jit
def load_rows(pointer, rows, columns, row_mask, stride, COLUMNS: tl.constexpr):
    """Load `[rows, columns]`: rows `stride` elements apart, columns side by side, 0 outside of either."""
    offsets = rows[:, None] * stride + columns[None, :]
    return tl.load(pointer + offsets, mask=row_mask[:, None] & (columns < COLUMNS)[None, :], other=0.0)


@triton.jit
def store_rows(pointer, rows, columns, row_mask, stride, value, COLUMNS: tl.constexpr):
    """Store `[rows, columns]` in the pointer's dtype, as `load_rows` loads it."""
    offsets = rows[:, None] * stride + columns[None, :]
    mask = row_mask[:, None] & (columns < COLUMNS)[None, :]
    tl.store(pointer + offsets, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def load_state(pointer, keys, values, K: tl.constexpr, V: tl.constexpr):
    """Load a block of a state `[K, V]`, 0 outside of it."""
    mask = (keys < K)[:, None] & (values < V)[None, :]
    return tl.load(pointer + keys[:, None] * V + values[None, :], mask=mask, other=0.0)


@triton.jit
def store_state(pointer, keys, values, value, K: tl.constexpr, V: tl.constexpr):
    """Store a block of a state `[K, V]`."""
    mask = (keys < K)[:, None] & (values < V)[None, :]
    tl.store(pointer + keys[:, None] * V + values[None, :], value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def same_document(documents, first, rows, columns, count):
    """Return bool `[rows, columns]`: whether two tokens of a chunk are of one document.

    `documents` is None (all are) or points to int32 at the row's first token; the chunk begins at token `first`.
    """
    both = (rows < count)[:, None] & (columns < count)[None, :]
    if documents is not None:
        ours = tl.load(documents + first + rows, mask=rows < count, other=-1)
        theirs = tl.load(documents + first + columns, mask=columns < count, other=-1)
        both &= ours[:, None] == theirs[None, :]
    return both


@triton.jit
def of_document(documents, first, rows, document, count):
    """Return bool `[rows]`: whether tokens of a chunk exist and are of this document (all are, without documents)."""
    mask = rows < count
    if documents is not None:
        mask &= tl.load(documents + first + rows, mask=mask, other=-1) == document
    return mask
