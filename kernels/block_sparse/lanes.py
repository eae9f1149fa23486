"""Keys as kernels read them: for each row of the batch and head the keys at hand sorted by class and position.

A slot of a selection is then one interval of a lane. Without classes the query heads of a KV head share its lane; with
classes each head that has classes of its own has a lane of its own.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from longctx.kernels.block_sparse.selection import Selection


@dataclass(frozen=True, eq=False, kw_only=True)
class Lanes:
    """The order of the keys at hand, and what the queries see of it.

    Attributes:
        order: int64 `[R or 1, lanes per row or 1, Tk]`, the keys of each lane in its order; None = as they are.
        begin, end: int64 `[R, T, HS, S]`, each slot's interval in the order of its lane.
        per_head: whether heads of HS have lanes of their own, rather than KV heads.
    """

    order: Tensor | None
    begin: Tensor
    end: Tensor
    per_head: bool


def lanes_of(selection: Selection, k_positions: Tensor) -> Lanes:
    """Sort the keys at `k_positions`, int64 `[Tk]`, and find each slot among them."""
    assert selection.beside is None, "kernels are given parts of a selection"
    if selection.key_class is None or selection.slot_class is None:
        ascending = bool((k_positions[1:] > k_positions[:-1]).all())
        order = None if ascending else torch.argsort(k_positions)
        places = (k_positions if order is None else k_positions[order]).contiguous()
        begin = torch.searchsorted(places, selection.lo.contiguous())
        end = torch.searchsorted(places, selection.hi.contiguous(), right=True)
        return Lanes(order=None if order is None else order[None, None], begin=begin, end=end, per_head=False)
    total = selection.key_class.shape[1]
    codes = selection.key_class[:, k_positions].to(torch.int64).permute(0, 2, 1) * total + k_positions  # [R, HS, Tk]
    codes, order = torch.sort(codes.contiguous(), dim=-1)
    base = selection.slot_class * total
    # Inside of a class: what lies before the first or behind the last position would be another one's.
    lows, highs = (base + x.clamp(0, total - 1) for x in (selection.lo, selection.hi))
    heads_first = [x.permute(0, 2, 1, 3).flatten(2).contiguous() for x in (lows, highs)]
    begin = torch.searchsorted(codes, heads_first[0])
    end = torch.searchsorted(codes, heads_first[1], right=True)
    begin, end = (x.unflatten(2, (selection.tokens, -1)).permute(0, 2, 1, 3) for x in (begin, end))
    empty = (selection.hi < selection.lo) | (selection.hi < 0) | (selection.lo >= total)
    return Lanes(order=order, begin=begin, end=torch.where(empty, begin, end), per_head=True)


def to_lanes(x: Tensor, lanes: Lanes, *, heads: int) -> Tensor:
    """Return `x [B, Tk, HK, D]` as `[B, lanes, Tk, D]`, contiguous; `heads` is HS."""
    by_head = x.transpose(1, 2)
    if lanes.per_head:
        by_head = by_head.repeat_interleave(heads // by_head.shape[1], dim=1)
    if lanes.order is None:
        return by_head.contiguous()
    order = lanes.order.expand(by_head.shape[0], by_head.shape[1], -1)[..., None].expand(-1, -1, -1, by_head.shape[3])
    return by_head.gather(2, order)


def add_from_lanes(x: Tensor, lanes: Lanes, *, into: Tensor) -> None:
    """Add `x [B, lanes, Tk, D]` to `into [B, Tk, HK, D]`, each key at its place; the lanes of a KV head are summed."""
    if lanes.order is not None:
        order = lanes.order.expand(x.shape[0], x.shape[1], -1)[..., None].expand(-1, -1, -1, x.shape[3])
        x = torch.empty_like(x).scatter_(2, order, x)
    into += x.unflatten(1, (into.shape[2], -1)).sum(2).transpose(1, 2)
