"""Parts of a mask: bands on `k - q`, possibly restricted to the first tokens of a document. Integers only, no torch.

A mask is a disjoint union of parts. Two parts meet in a part, so masks are closed under `&`; here are that meeting, the
re-reading of a part when documents are cut further, and the canonical form that makes equal masks compare equal.
"""

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise


@dataclass(frozen=True, slots=True)
class Part:
    """Let query q see key k iff `least <= k - q <= most` and k is among the first tokens of its document.

    Attributes:
        least: the smallest visible `k - q`; None = no bound.
        most: the largest visible `k - q`; None = no bound.
        first: how many tokens at the start of a document can be seen; None = all. An int holds for every document, and
            means the documents of the final mask: `&` with documents moves it to their starts. A tuple has one entry
            per document of the mask's own `cu_seqlens`, and stays at those tokens when the documents are cut further.
        cap: an int as in `first`, beside a `first` that is a tuple. `&` makes it; nobody needs to give it.
    """

    least: int | None = None
    most: int | None = None
    first: int | tuple[int, ...] | None = None
    cap: int | None = None

    def __post_init__(self) -> None:
        assert self.cap is None or isinstance(self.first, tuple), self
        counts = self.first if isinstance(self.first, tuple) else (self.first,)
        for count in (*counts, self.cap):
            if count is not None and count < 0:
                raise ValueError(f"a mask's first tokens must be >= 0 or None; given {count}")

    @property
    def empty(self) -> bool:
        """Tell whether nothing is visible, whatever the documents."""
        if self.least is not None and self.most is not None and self.least > self.most:
            return True
        return self.cap == 0 or self.first == 0 or (isinstance(self.first, tuple) and not any(self.first))


def intersect(a: Part, b: Part) -> Part:
    """Return what both parts let through (maybe empty); tuples in `first` are about the same documents."""
    least = b.least if a.least is None else a.least if b.least is None else max(a.least, b.least)
    most = b.most if a.most is None else a.most if b.most is None else min(a.most, b.most)
    tuples = [part.first for part in (a, b) if isinstance(part.first, tuple)]
    ints = [count for part in (a, b) for count in (part.first, part.cap) if isinstance(count, int)]
    together = min(ints, default=None)
    if not tuples:
        return Part(least, most, together)
    first = tuples[0] if len(tuples) == 1 else tuple(map(min, *tuples))
    return Part(least, most, first, together)


def refine(part: Part, *, coarse: tuple[int, ...], fine: tuple[int, ...]) -> Part:
    """Say the same about the documents `fine` as about `coarse`, whose bounds are among those of `fine`."""
    if not isinstance(part.first, tuple) or coarse == fine:
        return part
    first = []
    for start, end in pairwise(fine):
        document = bisect_right(coarse, start) - 1
        first.append(min(max(coarse[document] + part.first[document] - start, 0), end - start))
    return replace(part, first=tuple(first))


def canonical(parts: Iterable[Part]) -> tuple[Part, ...]:
    """Return the parts in ascending order without empty ones, those that continue each other as one.

    Raises:
        ValueError: two parts share a `k - q`: a pair could be visible twice.
    """
    whole: list[Part] = []
    ascending = sorted(
        (part for part in parts if not part.empty),
        key=lambda part: (part.least is not None, part.least or 0),
    )
    for part in ascending:
        if not whole:
            whole.append(part)
            continue
        before = whole[-1]
        if before.most is None or part.least is None or part.least <= before.most:
            raise ValueError(f"the parts of a mask must not overlap; given {before} and {part}")
        if part.least == before.most + 1 and (part.first, part.cap) == (before.first, before.cap):
            whole[-1] = replace(before, most=part.most)
        else:
            whole.append(part)
    return tuple(whole)
