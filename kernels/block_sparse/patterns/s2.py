"""S2-Attention (arXiv 2407.17678): a local window of blocks, and the blocks before shared out among the heads."""

from dataclasses import dataclass

import torch
from torch import Tensor

from longctx.kernels.block_sparse.patterns.counts import in_block, rounded, whole_before
from longctx.kernels.block_sparse.patterns.pattern import Slot, select, tile_width, where_keys_are, where_queries_are
from longctx.kernels.block_sparse.selection import Selection


@dataclass(frozen=True, kw_only=True)
class S2:
    """Let a query see the last `local` blocks, and those of the shard of its head.

    The shard of head g are the blocks n with `(n + 1 + g step) % stride == 0`, `step = max(1, stride // heads)`, as in
    the paper's DKernel. Any `stride` heads in a row then see all of the past between them. Heads are KV heads, whose
    query heads see the same (the paper's KV-efficient sharding), if there are `stride` of them; or else query heads,
    which costs a copy of k and v for each, if there are `stride` of those. With fewer heads than shards those of KV
    heads are spread evenly, and parts of the past are in none.

    Attributes:
        block_size: tokens of a block, counted from where the document begins.
        local: blocks of the local window, the query's own one among them.
        stride: shards: a head sees one of so many blocks.
    """

    block_size: int
    local: int
    stride: int

    def __post_init__(self) -> None:
        for name in ("block_size", "local", "stride"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1; given {getattr(self, name)}")

    def selection(self, *, positions: Tensor, document_of: Tensor, num_heads: int, num_kv_heads: int) -> Selection:
        """Return what the queries at `positions` see; see `Pattern`.

        In each head, blocks of its shard are of class 1 and all others of class 0: two slots, whatever the length.
        """
        here, first = where_queries_are(positions, document_of)
        heads = num_heads if num_kv_heads < self.stride <= num_heads else num_kv_heads
        head = torch.arange(heads, device=here.device)
        block = where_keys_are(document_of)[..., None] // self.block_size
        shard = (block + 1 + head * max(self.stride // heads, 1)) % self.stride == 0
        oldest = torch.clamp((here - first) // self.block_size - self.local + 1, min=0)
        slots = [
            Slot(first + oldest * self.block_size, here, torch.zeros_like(here)),
            Slot(first, here, torch.ones_like(here)),
        ]
        return select(slots, heads=heads, key_class=shard, block_size=tile_width(self.block_size))

    def pairs(self, begin: int, length: int) -> int:
        """Return visible pairs; see `Pattern`. The mean is over all `stride` shards, each as often as the others."""
        # A query sees what is in its own block, `local - 1` whole ones, and of what is before one of `stride`.
        before = whole_before(max(length - (self.local - 1) * self.block_size, 0), self.block_size)
        near = whole_before(length, self.block_size) - before
        total = in_block(length, self.block_size) + self.block_size * near
        return rounded(total * self.stride + self.block_size * before, self.stride)
