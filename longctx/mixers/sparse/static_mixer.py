"""Sparse attention by a static pattern: its selection is made once for all layers that are at the same place."""

import threading
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from longctx.kernels.block_sparse.patterns.pattern import Pattern
from longctx.kernels.block_sparse.selection import Selection, narrowed
from longctx.mixers.sparse.base import Inputs, SparseMixer
from longctx.mixers.sparse_place import SparsePlace


class StaticMixer(SparseMixer):
    """Attention to what a static pattern shows; it has no parameters."""

    def __init__(self, pattern: Pattern) -> None:
        super().__init__()
        self.pattern = pattern

    def forward(self, inputs: Inputs, *, place: SparsePlace) -> Tensor:
        """Return out `[B, T, H, D]`."""
        selection = selection_at(self.pattern, place, num_heads=inputs.q.shape[2], num_kv_heads=inputs.k.shape[2])
        return place.attend(inputs.q, inputs.k, inputs.v, selection=selection, sink_logits=inputs.sink_logits)

    def extra_repr(self) -> str:
        """Return the pattern in words."""
        return str(self.pattern)


class _Made(NamedTuple):
    pattern: Pattern
    heads: tuple[int, int]
    positions: Tensor
    selection: Selection


MOST = 8  # selections that are kept for the documents of a batch: one for each pattern and layout that layers have
_made = WeakTensorKeyDictionary()  # document_of -> list[_Made]; gone with the batch
_lock = threading.Lock()  # simulated ranks are threads


def selection_at(pattern: Pattern, place: SparsePlace, *, num_heads: int, num_kv_heads: int) -> Selection:
    """Return the pattern's selection of a place's queries, the one that an earlier layer was given if there is one.

    It is that of the same `document_of` (the tensor itself) and of equal positions: who makes places does not write to
    tensors of theirs.
    """
    document_of, positions, heads = place.document_of, place.positions, (num_heads, num_kv_heads)
    with _lock:
        made: list[_Made] = _made.setdefault(document_of, [])
        for one in made:
            if one.pattern == pattern and one.heads == heads and _equal(one.positions, positions):
                return one.selection
        selection = pattern.selection(
            positions=positions, document_of=document_of, num_heads=num_heads, num_kv_heads=num_kv_heads
        )
        selection = narrowed(selection, total=place.total)  # layers keep it until the backward: one copy for all
        made.append(_Made(pattern, heads, positions, selection))
        del made[:-MOST]
        return selection


def _equal(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.device == b.device and torch.equal(a, b))
