"""The fixed pattern of Sparse Transformers (arXiv 1904.10509): a query's own block, and the ends of those before."""

from dataclasses import dataclass

import torch
from torch import Tensor

from longctx.kernels.block_sparse.patterns.counts import in_block, rounded, whole_before
from longctx.kernels.block_sparse.patterns.heads import MERGED, check_heads, local_heads
from longctx.kernels.block_sparse.patterns.pattern import Slot, select, tile_width, where_keys_are, where_queries_are
from longctx.kernels.block_sparse.selection import Selection


@dataclass(frozen=True, kw_only=True)
class Fixed:
    """Let query i see `j // stride == i // stride`, and `j % stride >= stride - columns`, both with `j <= i`.

    With alternating heads, those of the second set see nothing before the first of its keys: their output is 0 there.

    Attributes:
        stride: tokens of a block.
        columns: the last tokens of each block, which all later queries see; the paper's c, 8 to 32 for a stride of 128.
        heads: `merged`: every head sees the union in one softmax; `alternate`: KV heads in turn the one or the other.
    """

    stride: int
    columns: int
    heads: str = MERGED

    def __post_init__(self) -> None:
        check_heads(self.heads)
        if not 1 <= self.columns <= self.stride:
            raise ValueError(f"columns must be 1 to stride={self.stride}; given {self.columns}")

    def selection(self, *, positions: Tensor, document_of: Tensor, num_heads: int, num_kv_heads: int) -> Selection:
        """Return what the queries at `positions` see; see `Pattern`."""
        here, first = where_queries_are(positions, document_of)
        column = where_keys_are(document_of)[..., None] % self.stride >= self.stride - self.columns
        own = here - (here - first) % self.stride
        width = tile_width(self.stride)
        if self.heads == MERGED:
            slots = [Slot(own, here, torch.zeros_like(here)), Slot(first, here, torch.ones_like(here))]
            return select(slots, heads=num_kv_heads, key_class=column, block_size=width)
        local = local_heads(num_kv_heads, device=here.device)
        slot = Slot(torch.where(local, own, first), here, torch.zeros_like(here))
        key_class = torch.where(local | column, 0, -1)
        return select([slot], heads=num_kv_heads, key_class=key_class, block_size=width)

    def pairs(self, begin: int, length: int) -> int:
        """Return visible pairs; see `Pattern`. Alternating heads are counted as if their number were even."""
        local, before = in_block(length, self.stride), self.columns * whole_before(length, self.stride)
        if self.heads == MERGED:
            return local + before
        # Columns of the own block: as many as in blocks of `columns` tokens, which begin that much later.
        blocks, rest = divmod(length, self.stride)
        shown = max(rest - (self.stride - self.columns), 0)
        own = in_block(blocks * self.columns + shown, self.columns)
        return rounded(local + before + own, 2)
