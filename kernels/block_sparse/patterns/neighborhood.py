"""Generalized neighborhood attention in one dimension, causal (GNA, arXiv 2504.16922)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from longctx.kernels.block_sparse.patterns.counts import triangle
from longctx.kernels.block_sparse.patterns.pattern import Slot, select, tile_width, where_keys_are, where_queries_are
from longctx.kernels.block_sparse.selection import Selection


@dataclass(frozen=True, kw_only=True)
class Neighborhood:
    """Let the queries of a group of `stride` see the window of the group's leader, each as far as itself.

    The leader is the last query of its group, as in NATTEN: query i sees

        leader - window < j <= i,   leader = i // stride * stride + stride - 1

    so a group's queries share where their window begins, and see between `window - stride + 1` and `window` keys. Where
    a document ends inside a group, NATTEN takes its last token as the leader. Here that group is treated as if it were
    whole, since what a token sees must not depend on what follows.

    With a dilation all of this is among the tokens that are a multiple of it apart: `i`, `j` and the leader are then
    numbers of tokens with the same remainder.

    Attributes:
        window: keys, GNA's kernel size.
        stride: 1 = a sliding window; window = blocks that see themselves only; not more than the window, or else a
            group's first queries would not see themselves.
        dilation: distance of the keys of a window.
    """

    window: int
    stride: int = 1
    dilation: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.stride <= self.window:
            raise ValueError(f"stride must be 1 to window={self.window}; given {self.stride}")
        if self.dilation < 1:
            raise ValueError(f"dilation must be >= 1; given {self.dilation}")

    def selection(self, *, positions: Tensor, document_of: Tensor, num_heads: int, num_kv_heads: int) -> Selection:
        """Return what the queries at `positions` see; see `Pattern`."""
        here, first = where_queries_are(positions, document_of)
        number, remainder = (here - first) // self.dilation, (here - first) % self.dilation
        leader = number - number % self.stride + self.stride - 1
        begin = torch.clamp(leader - self.window + 1, min=0)
        lo, width = first + remainder + begin * self.dilation, tile_width(self.window)
        if self.dilation == 1:
            return select([Slot(lo, here)], heads=num_kv_heads, block_size=width)
        key_class = where_keys_are(document_of)[..., None] % self.dilation
        return select([Slot(lo, here, remainder)], heads=num_kv_heads, key_class=key_class, block_size=width)

    def pairs(self, begin: int, length: int) -> int:
        """Return visible pairs; see `Pattern`."""
        short, more = divmod(length, self.dilation)  # `more` remainders have one token more
        return more * self._pairs(short + 1) + (self.dilation - more) * self._pairs(short)

    def _pairs(self, length: int) -> int:
        """Return those of `length` tokens without dilation: causal ones but for what is before the windows."""
        groups, rest = divmod(length, self.stride)
        moved = self.window // self.stride  # groups whose window begins with the document
        count = max(groups - moved, 0)
        before = self.stride * (triangle(groups) - triangle(moved)) - self.window * count if count else 0
        partial = rest * max((groups + 1) * self.stride - self.window, 0)
        return triangle(length) - self.stride * before - partial
