"""Static patterns: what a query sees follows from where it is in its document, and from nothing else.

A pattern is a value. It counts positions from where a document begins, so a document sees the same whether it is packed
with others or alone; and it never asks where a document ends, so a token sees the same whatever follows.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from longctx.kernels.block_sparse.selection import Selection


class Pattern(Protocol):
    """A static pattern; frozen and hashable."""

    def selection(self, *, positions: Tensor, document_of: Tensor, num_heads: int, num_kv_heads: int) -> Selection:
        """Return what the queries at `positions` see.

        Args:
            positions: int64 `[T]`.
            document_of: int64 `[R, total]`, the first position of each position's document.
            num_heads: H.
            num_kv_heads: HK.

        Raises:
            ValueError: the pattern is not for so many heads.
        """
        ...

    def pairs(self, begin: int, length: int) -> int:
        """Return the pairs of a query and a key that it sees in a document, the mean over heads, rounded.

        Args:
            begin: the document's first position, on which it does not depend.
            length: tokens of the document.
        """
        ...


class Slot(NamedTuple):
    """One slot of every query; each int64, of a shape that broadcasts to `[R, T, HS]`."""

    lo: Tensor
    hi: Tensor
    key_class: Tensor | None = None


def where_queries_are(positions: Tensor, document_of: Tensor) -> tuple[Tensor, Tensor]:
    """Return the positions of queries, int64 `[1, T, 1]`, and where their documents begin, int64 `[R, T, 1]`."""
    return positions[None, :, None], document_of[:, positions, None]


def where_keys_are(document_of: Tensor) -> Tensor:
    """Return every position counted from where its document begins, int64 `[R, total]`."""
    return torch.arange(document_of.shape[1], device=document_of.device) - document_of


def select(slots: Sequence[Slot], *, heads: int, key_class: Tensor | None = None, block_size: int) -> Selection:
    """Return the selection of these slots; what is alike in all heads is not copied for each.

    Args:
        heads: HS.
        key_class: `[R, total, HS]`, or `[R, total, 1]` where it is alike.
    """
    parts = [x for slot in slots for x in slot if x is not None]
    shape = (*torch.broadcast_shapes(*(x.shape for x in parts)), len(slots))

    def stacked(tensors: Sequence[Tensor]) -> Tensor:
        return torch.stack([x.expand(shape[:-1]) for x in tensors], dim=-1).expand(-1, -1, heads, -1)

    classes = [slot.key_class for slot in slots if slot.key_class is not None]
    return Selection(
        lo=stacked([slot.lo for slot in slots]),
        hi=stacked([slot.hi for slot in slots]),
        slot_class=stacked(classes) if classes else None,
        key_class=None if key_class is None else key_class.to(torch.int32).expand(-1, -1, heads),
        block_size=block_size,
    )


def tile_width(run: int) -> int:
    """Return the width of tiles for keys that are seen in runs of `run`: 128, or 64 where runs are shorter than that.

    A query pays for whole tiles, so a tile should not be much wider than a run. Below 64 a matrix unit is not filled,
    and there are as many exchanged blocks and pairs to list as there is arithmetic to save.
    """
    return 128 if run >= 128 else 64
