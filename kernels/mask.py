"""Masks on global positions: who may see whom. Closed under `&`.

A mask is a disjoint union of bands on `k - q`, each possibly for the first tokens of a document only, inside of blocks
(documents, cut further into chunks). On any two segments of equal stride that is a list of banded tiles (`tiles.py`).
What no band can express is a predicate, evaluated pair by pair.
"""

import operator
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import overload

import torch
from torch import Tensor

from longctx.kernels.mask_parts import Part, canonical, intersect, refine
from longctx.kernels.positions import check_bounds
from longctx.kernels.predicate import Predicate, evaluate

__all__ = [
    "HeadMasks", "Mask", "Part", "Predicate", "causal", "chunked", "documents", "full", "per_head", "plain_masks",
    "predicate", "prefix_lm", "sliding_window",
]  # fmt: skip


@dataclass(frozen=True)
class Mask:
    """Let a query see the keys of any part that are in its document and chunks, if all predicates agree.

    The order in which masks are composed does not matter to `==`. Fields are hashed once: with packed documents they
    are long, and masks are keys of caches.

    Attributes:
        parts: disjoint bands, see `Part`; kept in ascending order. `()` hides everything.
        cu_seqlens: document bounds from 0 to the number of tokens; None = one document.
        chunks: sizes; a query sees keys of its own chunk only, chunks being counted from the document's start. They,
            and a part's integer `first`, mean the documents of the final mask.
        predicates: functions of positions `[Tq, 1]` and `[1, Tk]`, hashable, equal if they are the same object. They
            must not depend on state that changes or differs between ranks.
    """

    parts: tuple[Part, ...] = (Part(),)
    cu_seqlens: tuple[int, ...] | None = None
    chunks: tuple[int, ...] = ()
    predicates: tuple[Predicate, ...] = ()

    def __post_init__(self) -> None:
        if self.cu_seqlens is not None:
            check_bounds(self.cu_seqlens, total=self.cu_seqlens[-1] if self.cu_seqlens else 0)
        for part in self.parts:
            if isinstance(part.first, tuple):
                _check_first(part.first, self.cu_seqlens)
        for size in self.chunks:
            if size < 1:
                raise ValueError(f"a mask's chunks must have at least 1 token; given {size}")
        sizes = sorted(set(self.chunks))
        # The same chunk of 4 is the same chunk of 8: multiples say nothing more.
        chunks = tuple(size for size in sizes if not any(size % other == 0 for other in sizes if other < size))
        object.__setattr__(self, "parts", canonical(self.parts))
        object.__setattr__(self, "chunks", chunks)
        object.__setattr__(self, "predicates", tuple(sorted(set(self.predicates), key=id)))

    @overload
    def __and__(self, other: "Mask") -> "Mask": ...
    @overload
    def __and__(self, other: "HeadMasks") -> "HeadMasks": ...
    def __and__(self, other: "Mask | HeadMasks") -> "Mask | HeadMasks":
        """Return the mask that lets through what both let through, documents being cut at the bounds of both first.

        Raises:
            ValueError: the two are about documents of different total length.
        """
        if isinstance(other, HeadMasks):
            return HeadMasks(tuple(self & mask for mask in other.masks))
        bounds = _finer(self.cu_seqlens, other.cu_seqlens)
        mine, theirs = self._parts_on(bounds), other._parts_on(bounds)
        return Mask(
            parts=tuple(intersect(a, b) for a in mine for b in theirs),
            cu_seqlens=bounds,
            chunks=self.chunks + other.chunks,
            predicates=self.predicates + other.predicates,
        )

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        # Without what is cached: hashes differ between processes.
        return Mask, (self.parts, self.cu_seqlens, self.chunks, self.predicates)

    @property
    def banded(self) -> bool:
        """Tell whether bands say it all: there are no predicates."""
        return not self.predicates

    def document_bounds(self, total: int) -> tuple[int, ...]:
        """Return the document bounds of a sequence of `total` tokens.

        Raises:
            ValueError: the mask's documents do not have `total` tokens.
        """
        if self.cu_seqlens is None:
            return (0, total)
        if self.cu_seqlens[-1] != total:
            check_bounds(self.cu_seqlens, total=total)
        return self.cu_seqlens

    def bounds(self, total: int) -> tuple[int, ...]:
        """Return the bounds of the finest blocks, documents cut at chunks, of a sequence of `total` tokens.

        Nothing outside a query's block is visible. Raises as `document_bounds`.
        """
        if not self.chunks:
            return self.document_bounds(total)
        known = self._blocks.get(total)
        if known is None:
            cuts = {total}
            bounds = self.document_bounds(total)
            for start, end in pairwise(bounds):
                for size in self.chunks:
                    cuts.update(range(start, end, size))
            known = self._blocks[total] = tuple(sorted(cuts))
        return known

    def limits(self, total: int) -> tuple[tuple[int, ...] | None, ...]:
        """Return, for each part, the position before which its keys are visible: one per block of `bounds(total)`.

        None where a part's keys are visible wherever they are. Raises as `document_bounds`.
        """
        known = self._limits.get(total)
        if known is None:
            known = self._limits[total] = tuple(self._limits_of(part, total) for part in self.parts)
        return known

    def allowed(self, q_positions: Tensor, k_positions: Tensor, *, total: int | None = None) -> Tensor:
        """Evaluate the mask densely: int64 `[Tq]`, `[Tk]` -> bool `[Tq, Tk]`. The definition, for references and tests.

        Args:
            q_positions: positions of queries.
            k_positions: positions of keys, on the same device.
            total: the number of tokens of the sequence, to have the documents checked against it.
        """
        if total is not None:
            self.document_bounds(total)
        starts = torch.tensor((self.cu_seqlens or (0, 0))[:-1], dtype=torch.int64, device=q_positions.device)
        q_document = torch.bucketize(q_positions, starts[1:], right=True)
        k_document = torch.bucketize(k_positions, starts[1:], right=True)
        q_local, k_local = q_positions - starts[q_document], k_positions - starts[k_document]
        seen = torch.zeros(q_positions.shape[0], k_positions.shape[0], dtype=torch.bool, device=q_positions.device)
        difference = k_positions[None, :] - q_positions[:, None]
        for part in self.parts:
            inside = torch.ones_like(seen)
            if part.least is not None:
                inside &= difference >= part.least
            if part.most is not None:
                inside &= difference <= part.most
            if isinstance(part.first, tuple):
                inside &= k_local < torch.tensor(part.first, device=k_local.device)[k_document]
            elif part.first is not None:
                inside &= k_local < part.first
            if part.cap is not None:
                inside &= k_local < part.cap
            seen |= inside
        seen &= q_document[:, None] == k_document[None, :]
        for size in self.chunks:
            seen &= (q_local // size)[:, None] == (k_local // size)[None, :]
        return seen & evaluate(self.predicates, q_positions, k_positions) if self.predicates else seen

    def _parts_on(self, bounds: tuple[int, ...] | None) -> tuple[Part, ...]:
        if self.cu_seqlens is None or bounds is None:
            return self.parts
        return tuple(refine(part, coarse=self.cu_seqlens, fine=bounds) for part in self.parts)

    @cached_property
    def _hash(self) -> int:
        return hash((self.parts, self.cu_seqlens, self.chunks, self.predicates))

    @cached_property
    def _blocks(self) -> dict[int, tuple[int, ...]]:
        return {}

    @cached_property
    def _limits(self) -> dict[int, tuple[tuple[int, ...] | None, ...]]:
        return {}

    def _limits_of(self, part: Part, total: int) -> tuple[int, ...] | None:
        if part.first is None:
            return None
        starts, blocks = self.document_bounds(total)[:-1], self.bounds(total)[:-1]
        if isinstance(part.first, tuple):
            counts = part.first if part.cap is None else tuple(min(count, part.cap) for count in part.first)
        else:
            counts = (part.first,) * len(starts)
        ends = [start + count for start, count in zip(starts, counts, strict=True)]
        if blocks == starts:
            return tuple(ends)
        return tuple(ends[bisect_right(starts, block) - 1] for block in blocks)


@dataclass(frozen=True)
class HeadMasks:
    """One mask per query head. `&` is per head, with a mask for all heads or with one per head."""

    masks: tuple[Mask, ...]

    def __post_init__(self) -> None:
        if not self.masks or not all(isinstance(mask, Mask) for mask in self.masks):
            raise ValueError(f"per_head needs one Mask for each query head; given {self.masks}")

    def __and__(self, other: "Mask | HeadMasks") -> "HeadMasks":
        """Return what both let through, head by head."""
        others = other.masks if isinstance(other, HeadMasks) else (other,) * len(self.masks)
        if len(others) != len(self.masks):
            raise ValueError(f"cannot combine masks of {len(self.masks)} heads with masks of {len(others)} heads")
        return HeadMasks(tuple(a & b for a, b in zip(self.masks, others, strict=True)))

    @property
    def banded(self) -> bool:
        """Tell whether bands say it all, for every head."""
        return all(mask.banded for mask in self.masks)


def plain_masks(mask: Mask | HeadMasks) -> tuple[Mask, ...]:
    """Return the masks of all heads, or the only one."""
    return mask.masks if isinstance(mask, HeadMasks) else (mask,)


def full() -> Mask:
    """Let every query see every key (bidirectional)."""
    return Mask()


def causal() -> Mask:
    """Let a query see itself and what comes before it."""
    return Mask((Part(most=0),))


def sliding_window(left: int | None, right: int | None = 0, *, sinks: int = 0) -> Mask:
    """Let a query see `left` keys before it, itself, and `right` keys after it (None = all), and attention sinks.

    Args:
        left: how many earlier keys a query sees.
        right: how many later keys.
        sinks: the first so many tokens of each document are seen from any distance (StreamingLLM, arXiv:2309.17453): by
            what comes after them if `right` is 0, by all queries of the document otherwise.
    """
    left = None if left is None else _whole("sliding_window left", left)
    right = None if right is None else _whole("sliding_window right", right)
    sinks = _whole("sliding_window sinks", sinks)
    parts = [Part(least=None if left is None else -left, most=right)]
    if left is not None:
        parts.append(Part(most=-left - 1, first=sinks))
    if right is not None and right > 0:
        parts.append(Part(least=right + 1, first=sinks))
    return Mask(tuple(parts))


def prefix_lm(prefix: int | Sequence[int], cu_seqlens: Sequence[int] | None = None) -> Mask:
    """Let a query see what comes before it, itself, and the whole prefix of its document.

    Args:
        prefix: how many tokens the prefix has: an int for every document of the final mask (all of a shorter one), or
            one length per document of `cu_seqlens`.
        cu_seqlens: document bounds from 0 to the number of tokens.
    """
    bounds = None if cu_seqlens is None else _wholes("cu_seqlens", cu_seqlens)
    several = isinstance(prefix, Sequence | Tensor) or hasattr(prefix, "__len__")
    first = _wholes("prefix_lm prefix", prefix) if several else _whole("prefix_lm prefix", prefix)
    return Mask((Part(most=0), Part(least=1, first=first)), bounds)


def chunked(size: int) -> Mask:
    """Let a query see its own chunk of `size` tokens only, chunks being counted from the document's start."""
    return Mask(chunks=(_whole("chunked size", size),))


def documents(cu_seqlens: Sequence[int]) -> Mask:
    """Let a query see its own document only; `cu_seqlens` goes from 0 to the number of tokens."""
    return Mask(cu_seqlens=_wholes("cu_seqlens", cu_seqlens))


def predicate(function: Predicate) -> Mask:
    """Let through what `function` does: any mask, at the price of evaluating every pair.

    Args:
        function: gets global positions, int64 `[Tq, 1]` and `[1, Tk]`, and returns bool that broadcasts to `[Tq, Tk]`.
            It is called with positions on the CPU (to plan) and on the device of the tensors.
    """
    return Mask(predicates=(function,))


def per_head(masks: Sequence[Mask]) -> HeadMasks:
    """Give each query head a mask of its own."""
    return HeadMasks(tuple(masks))


def _whole(name: str, value: object) -> int:
    """Return an integer >= 0 of any integer type: 0-dim tensors would make equal masks differ."""
    try:
        number = -1 if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = -1
    if number < 0:
        raise ValueError(f"{name} must be an integer >= 0; given {value!r}")
    return number


def _wholes(name: str, values: object) -> tuple[int, ...]:
    listed = values.tolist() if isinstance(values, Tensor) else values
    return tuple(_whole(name, value) for value in listed)  # type: ignore[attr-defined]


def _finer(a: tuple[int, ...] | None, b: tuple[int, ...] | None) -> tuple[int, ...] | None:
    """Return the bounds of the documents that two lots of documents cut each other into."""
    if a is None or b is None or a == b:
        return b if a is None else a
    if a[-1] != b[-1]:
        raise ValueError(f"cannot combine documents of {a[-1]} tokens with documents of {b[-1]}")
    return tuple(sorted({*a, *b}))


def _check_first(first: tuple[int, ...], cu_seqlens: tuple[int, ...] | None) -> None:
    if cu_seqlens is None:
        raise ValueError(f"one prefix per document needs the documents: give cu_seqlens; given prefixes {first}")
    if len(first) != len(cu_seqlens) - 1:
        raise ValueError(f"need one prefix per document: {len(cu_seqlens) - 1}; given {len(first)}")
    for document, (count, start, end) in enumerate(zip(first, cu_seqlens, cu_seqlens[1:], strict=False)):
        if not 0 <= count <= end - start:
            raise ValueError(f"the prefix of document {document} must be 0 to its {end - start} tokens; given {count}")
