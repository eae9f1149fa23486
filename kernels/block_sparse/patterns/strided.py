"""The strided pattern of Sparse Transformers (arXiv 1904.10509): a local window, and every stride-th key before."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from longctx.kernels.block_sparse.patterns.counts import last, rounded, whole_before
from longctx.kernels.block_sparse.patterns.heads import MERGED, check_heads, local_heads
from longctx.kernels.block_sparse.patterns.pattern import Slot, select, tile_width, where_keys_are, where_queries_are
from longctx.kernels.block_sparse.selection import Selection


@dataclass(frozen=True, kw_only=True)
class Strided:
    """Let query i see the local set `i - stride < j <= i`, and the column set `(i - j) % stride == 0`, `j <= i`.

    The paper writes the local set with `i - stride` too, its code without; their union is the same.

    Attributes:
        stride: about the root of the length, so that both sets have as many keys.
        heads: `merged`: every head sees the union in one softmax; `alternate`: KV heads in turn the one or the other.
    """

    stride: int
    heads: str = MERGED

    def __post_init__(self) -> None:
        check_heads(self.heads)
        if self.stride < 1:
            raise ValueError(f"stride must be >= 1; given {self.stride}")

    def selection(self, *, positions: Tensor, document_of: Tensor, num_heads: int, num_kv_heads: int) -> Selection:
        """Return what the queries at `positions` see; see `Pattern`.

        A key's class is its column, so that a column is one slot. Merged, the window is beside it, without classes.
        """
        here, first = where_queries_are(positions, document_of)
        column, key_class = (here - first) % self.stride, where_keys_are(document_of)[..., None] % self.stride
        last_ones, width = torch.maximum(first, here - self.stride + 1), tile_width(self.stride)
        if self.heads == MERGED:
            window = select([Slot(last_ones, here)], heads=num_kv_heads, block_size=width)
            before = Slot(first, here - self.stride, column)
            columns = select([before], heads=num_kv_heads, key_class=key_class, block_size=width)
            return replace(window, beside=columns)
        local = local_heads(num_kv_heads, device=here.device)
        slot = Slot(torch.where(local, last_ones, first), here, torch.where(local, 0, column))
        key_class = torch.where(local, 0, key_class)
        return select([slot], heads=num_kv_heads, key_class=key_class, block_size=width)

    def pairs(self, begin: int, length: int) -> int:
        """Return visible pairs; see `Pattern`. Alternating heads are counted as if their number were even."""
        local, before = last(length, self.stride), whole_before(length, self.stride)
        return local + before if self.heads == MERGED else rounded(local + before + length, 2)
