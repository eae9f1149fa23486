"""What each query selects: for every slot of a query the keys of one class between two positions. Data, not code.

Every sparse pattern of this project is one of these, static or routed. A window is the slot `(0, t - w + 1, t)`; a
selected block is the slot of its positions; a strided column is a slot of the keys whose class is `t mod stride`; a
k-means cluster is a class. It is told in global positions, so it means the same on every layout and rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class Selection:
    """Let query t of head h see the keys of its slots: those of class `slot_class` at positions `lo` to `hi`.

    The slots of a query do not share a key. Heads are all query heads (`HS = H`), or one for each group of query heads
    that reads a KV head (`HS = HK`). Rows are those of the batch, or one for all (`R = 1`).

    Attributes:
        lo, hi: int64 `[R, T, HS, S]`, positions, both inclusive; a slot with `hi < lo` is empty.
        slot_class: int64 `[R, T, HS, S]`, >= 0; None = all 0.
        key_class: int32 `[R, total, HS]`, the class of every position of the sequence, negative where nobody sees it;
            None = all 0. Given if and only if `slot_class` is.
        block_size: tokens that lie together: kernels cut keys into tiles of so many, and ranks exchange them in blocks
            of so many.
    """

    lo: Tensor
    hi: Tensor
    slot_class: Tensor | None = None
    key_class: Tensor | None = None
    block_size: int

    def __post_init__(self) -> None:
        assert self.lo.dim() == 4 and self.lo.shape == self.hi.shape, (self.lo.shape, self.hi.shape)
        assert (self.slot_class is None) == (self.key_class is None), "classes of slots and of keys belong together"
        assert self.lo.dtype == self.hi.dtype == torch.int64, (self.lo.dtype, self.hi.dtype)
        assert self.block_size >= 1, self.block_size

    @property
    def rows(self) -> int:
        """Return R."""
        return self.lo.shape[0]

    @property
    def tokens(self) -> int:
        """Return T."""
        return self.lo.shape[1]

    @property
    def heads(self) -> int:
        """Return HS."""
        return self.lo.shape[2]

    @property
    def slots(self) -> int:
        """Return S."""
        return self.lo.shape[3]

    def of_heads(self, begin: int, end: int) -> "Selection":
        """Return that of heads `begin` to `end` of HS."""

        def part(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[:, :, begin:end]

        return replace(
            self,
            lo=self.lo[:, :, begin:end],
            hi=self.hi[:, :, begin:end],
            slot_class=part(self.slot_class),
            key_class=part(self.key_class),
        )


def allowed(selection: Selection, k_positions: Tensor) -> Tensor:
    """Evaluate a selection densely: which keys at `k_positions`, int64 `[Tk]`, each query sees. The definition.

    Returns:
        bool `[R, HS, T, Tk]`.
    """
    lo, hi = (x.permute(0, 2, 1, 3)[..., None, :] for x in (selection.lo, selection.hi))  # [R, HS, T, 1, S]
    place = k_positions[:, None]
    seen = (lo <= place) & (place <= hi)
    if selection.slot_class is not None and selection.key_class is not None:
        slots = selection.slot_class.permute(0, 2, 1, 3)[..., None, :]
        keys = selection.key_class[:, k_positions].permute(0, 2, 1)[:, :, None, :, None]
        seen = seen & (slots == keys)
    assert not (seen.sum(-1) > 1).any(), "two slots of a query share a key"
    return seen.any(-1)


def joined(parts: Sequence[Selection]) -> Selection:
    """Return the union of selections of the same queries that share no key: all of the same classes, or none of any."""
    assert parts
    block_size = max(part.block_size for part in parts)
    classed = [part for part in parts if part.key_class is not None]
    assert not classed or len(classed) == len(parts), "either all parts have classes or none has"
    assert all(part.key_class is classed[0].key_class for part in classed), "parts have the same classes of keys"
    lo, hi = (torch.cat([getattr(part, name) for part in parts], dim=-1) for name in ("lo", "hi"))
    slot_class = (
        torch.cat([part.slot_class for part in classed if part.slot_class is not None], -1) if classed else None
    )
    return Selection(
        lo=lo,
        hi=hi,
        slot_class=slot_class,
        key_class=classed[0].key_class if classed else None,
        block_size=block_size,
    )


def selected_blocks(blocks: Tensor, *, block_size: int, positions: Tensor, first: Tensor) -> Selection:
    """Return the selection of blocks of consecutive positions: block n holds `n block_size ... (n + 1) block_size - 1`.

    A query sees of a block what is in its own document and not after itself.

    Args:
        blocks: int64 `[B, T, HS, S]`, each at most once in a query's slots; negative = none.
        positions: int64 `[T]`, of the queries.
        first: int64 `[B, T]` or `[1, T]`, the first position of each query's document.
    """
    begin = blocks * block_size
    lo = torch.maximum(begin, first[:, :, None, None])
    hi = torch.minimum(begin + block_size - 1, positions[None, :, None, None])
    return Selection(lo=torch.where(blocks < 0, 1, lo), hi=torch.where(blocks < 0, 0, hi), block_size=block_size)
