"""What each query selects: for every slot of a query the keys of one class between two positions. Data, not code.

Every sparse pattern of this project is one of these, static or routed. A window is the slot `(0, t - w + 1, t)`; a
selected block is the slot of its positions; a strided column is a slot of the keys whose class is `t mod stride`; a
k-means cluster is a class. It is told in global positions, so it means the same on every layout and rank.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class Selection:
    """Let query t of head h see the keys of its slots: those of class `slot_class` at positions `lo` to `hi`.

    The slots of a query do not share a key. Heads are all query heads (`HS = H`), or one for each group of query heads
    that reads a KV head (`HS = HK`). Rows are those of the batch, or one for all (`R = 1`).

    A key is of one class. Where what is seen needs two, such as a window of whatever class and a column, there is
    another selection beside. Kernels know of none: they are given `parts()`, one after the other.

    Attributes:
        lo, hi: int64 `[R, T, HS, S]`, positions, both inclusive; a slot with `hi < lo` is empty. int32 where they are
            only kept (`narrowed`).
        slot_class: likewise, >= 0; None = all 0.
        key_class: int32 `[R, total, HS]`, the class of every position of the sequence, negative where nobody sees it;
            None = all 0. Given if and only if `slot_class` is.
        block_size: tokens that lie together: kernels cut keys into tiles of so many, and ranks exchange them in blocks
            of so many.
        beside: what the same queries see as well, none of it seen here too. It has classes, heads (H or HK) and rows of
            its own, and the same `block_size`; there are no gates with it. Sizes and slots are those without it.
    """

    lo: Tensor
    hi: Tensor
    slot_class: Tensor | None = None
    key_class: Tensor | None = None
    block_size: int
    beside: "Selection | None" = None

    def __post_init__(self) -> None:
        assert self.lo.dim() == 4 and self.lo.shape == self.hi.shape, (self.lo.shape, self.hi.shape)
        assert (self.slot_class is None) == (self.key_class is None), "classes of slots and of keys belong together"
        assert self.lo.dtype == self.hi.dtype in (torch.int64, torch.int32), (self.lo.dtype, self.hi.dtype)
        assert self.block_size >= 1, self.block_size
        if self.beside is not None:
            sizes = [(each.tokens, each.block_size) for each in (self, self.beside)]
            assert sizes[0] == sizes[1], sizes

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

    def parts(self) -> tuple["Selection", ...]:
        """Return the selections without others beside them that this is the union of."""
        return (self,) if self.beside is None else (replace(self, beside=None), *self.beside.parts())

    def of_heads(self, begin: int, end: int) -> "Selection":
        """Return that of heads `begin` to `end` of HS; of a part, since others beside it have heads of their own."""
        assert self.beside is None

        def part(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[:, :, begin:end]

        return replace(
            self,
            lo=self.lo[:, :, begin:end],
            hi=self.hi[:, :, begin:end],
            slot_class=part(self.slot_class),
            key_class=part(self.key_class),
        )


def narrowed(selection: Selection, *, total: int) -> Selection:
    """Return a selection in half the memory, to be kept until the backward pass: int32, where positions fit.

    What is alike for some rows or heads (`expand`) stays as it is: it would take more.
    """

    def narrow(x: Tensor | None) -> Tensor | None:
        return x if x is None or 0 in x.stride() else x.to(torch.int32)

    if total >= 2**31 or 0 in selection.lo.stride() or 0 in selection.hi.stride():
        return selection
    beside = None if selection.beside is None else narrowed(selection.beside, total=total)
    return replace(
        selection,
        lo=selection.lo.to(torch.int32),
        hi=selection.hi.to(torch.int32),
        slot_class=narrow(selection.slot_class),
        beside=beside,
    )


def widened(selection: Selection) -> Selection:
    """Return a selection without others beside it in int64, as kernels take it."""
    if selection.lo.dtype == torch.int64:
        return selection
    slots = selection.slot_class
    return replace(
        selection,
        lo=selection.lo.long(),
        hi=selection.hi.long(),
        slot_class=None if slots is None else slots.long(),
    )


def allowed(selection: Selection, k_positions: Tensor) -> Tensor:
    """Evaluate a selection densely: which keys at `k_positions`, int64 `[Tk]`, each query sees. The definition.

    Returns:
        bool `[R, HS, T, Tk]`, with the most rows and heads that a part has.
    """
    parts = selection.parts()
    heads = max(part.heads for part in parts)
    seen = [_slots_with(part, k_positions).repeat_interleave(heads // part.heads, dim=1) for part in parts]
    count = sum(seen[1:], start=seen[0])
    assert not (count > 1).any(), "two slots of a query share a key"
    return count > 0


def _slots_with(selection: Selection, k_positions: Tensor) -> Tensor:
    """Count the slots of one part that hold a key: int64 `[R, HS, T, Tk]`."""
    lo, hi = (x.permute(0, 2, 1, 3)[..., None, :] for x in (selection.lo, selection.hi))  # [R, HS, T, 1, S]
    place = k_positions[:, None]
    seen = (lo <= place) & (place <= hi)
    if selection.slot_class is not None and selection.key_class is not None:
        slots = selection.slot_class.permute(0, 2, 1, 3)[..., None, :]
        keys = selection.key_class[:, k_positions].permute(0, 2, 1)[:, :, None, :, None]
        seen = seen & (slots == keys)
    return seen.sum(-1)


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
