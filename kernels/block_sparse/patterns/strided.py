"""The strided pattern of Sparse Transformers (arXiv 1904.10509): a local window, and every stride-th key before."""

from dataclasses import dataclass

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
        """Return what the queries at `positions` see; see `Pattern`."""
        here, first = where_queries_are(positions, document_of)
        keys = where_keys_are(document_of)
        if self.heads != MERGED:
            return self._alternate(here, first, keys, num_kv_heads)
        # A key is of one class, its column, while the window has keys of all columns: somewhere keys need slots of
        # their own. Those of the column, if they are fewer than the columns are; else those of the window.
        column = int(keys.max()) // self.stride
        if column < self.stride:
            return self._window_and_keys(here, first, column, num_kv_heads)
        return self._column_and_keys(here, first, keys, num_kv_heads)

    def pairs(self, begin: int, length: int) -> int:
        """Return visible pairs; see `Pattern`. Alternating heads are counted as if their number were even."""
        local, before = last(length, self.stride), whole_before(length, self.stride)
        return local + before if self.heads == MERGED else rounded(local + before + length, 2)

    def _alternate(self, here: Tensor, first: Tensor, keys: Tensor, heads: int) -> Selection:
        local = local_heads(heads, device=keys.device)
        slot = Slot(
            lo=torch.where(local, torch.maximum(first, here - self.stride + 1), first),
            hi=here,
            key_class=torch.where(local, 0, (here - first) % self.stride),
        )
        key_class = torch.where(local, 0, keys[..., None] % self.stride)
        return select([slot], heads=heads, key_class=key_class, block_size=tile_width(self.stride))

    def _window_and_keys(self, here: Tensor, first: Tensor, column: int, heads: int) -> Selection:
        """Return the window as one slot, and a slot for each of the `column` keys of the column before it."""
        slots = [Slot(torch.maximum(first, here - self.stride + 1), here)]
        for back in range(1, column + 1):
            slots.append(_key(here - back * self.stride, first))
        return select(slots, heads=heads, block_size=tile_width(1))

    def _column_and_keys(self, here: Tensor, first: Tensor, keys: Tensor, heads: int) -> Selection:
        """Return the column as one slot, its class, and a slot for each key of the window that is not of it."""
        slots = [Slot(first, here, (here - first) % self.stride)]
        for back in range(1, self.stride):
            slots.append(_key(here - back, first, (here - back - first) % self.stride))
        return select(slots, heads=heads, key_class=keys[..., None] % self.stride, block_size=tile_width(1))


def _key(place: Tensor, first: Tensor, key_class: Tensor | None = None) -> Slot:
    """Return a slot of the key at `place`, empty where that is before the document."""
    return Slot(place, torch.where(place >= first, place, place - 1), key_class)
