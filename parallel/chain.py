"""The chain of segments: whose state enters whose segment, over all ranks. Integers only.

A link is a run of consecutive positions that one rank holds. Linear attention walks the links in the order of the
sequence; gradients walk the same chain in reverse.

| layout              | links                         |
|---------------------|-------------------------------|
| contiguous          | cp                            |
| zigzag              | 2 cp - 1: up the ranks and down again, the last rank's two chunks being one run |
| striped, width w    | T / w, round after round of cp |
| striped, width 1    | T: every token is a link of its own |
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache

from longctx.kernels.positions import Segment
from longctx.parallel.layout import Layout


@dataclass(frozen=True)
class Chain:
    """All ranks' segments in the order of the sequence.

    Attributes:
        links: (rank, local index of the segment) of each.
    """

    links: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        counts: dict[int, list[int]] = {}
        for rank, segment in self.links:
            counts.setdefault(rank, []).append(segment)
        assert all(sorted(segments) == list(range(len(segments))) for segments in counts.values()), self.links

    def __len__(self) -> int:
        return len(self.links)

    def owner(self, place: int) -> int:
        """Return the rank of a link."""
        return self.links[place][0]

    def places(self, rank: int) -> tuple[int, ...]:
        """Return where in the chain each segment of a rank is, by local index."""
        return self._places.get(rank, ())

    def walk(self, rank: int) -> tuple[tuple[int, int], ...]:
        """Return (place, local index) of a rank's segments in the order of the chain."""
        return tuple(sorted((place, segment) for segment, place in enumerate(self.places(rank))))

    def reversed(self) -> "Chain":
        """Return the chain of gradients; segments keep their local indices."""
        return self._reversed

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        """Return the ranks that hold links, ascending."""
        return tuple(sorted(self._places))

    @cached_property
    def _places(self) -> dict[int, tuple[int, ...]]:
        found: dict[int, dict[int, int]] = {}
        for place, (rank, segment) in enumerate(self.links):
            found.setdefault(rank, {})[segment] = place
        return {rank: tuple(places[segment] for segment in range(len(places))) for rank, places in found.items()}

    @cached_property
    def _reversed(self) -> "Chain":
        return Chain(self.links[::-1])


@lru_cache(maxsize=64)
def runs(layout: Layout, rank: int, total: int) -> tuple[Segment, ...]:
    """Return a rank's tokens as ascending runs of consecutive positions, as long as can be, in local order."""
    found: list[Segment] = []
    for segment in layout.segments(rank, total):
        single = [segment.part(index, index + 1) for index in range(segment.count)]
        for piece in single if segment.stride > 1 else [segment]:
            if found and found[-1].last + 1 == piece.start:
                found[-1] = Segment(found[-1].start, 1, found[-1].count + piece.count)
            else:
                found.append(Segment(piece.start, 1, piece.count))
    return tuple(found)


@lru_cache(maxsize=16)
def chain(layout: Layout, total: int) -> Chain:
    """Return the chain of a layout; with token stripes that is as many links as there are tokens."""
    starts = [
        (segment.start, rank, index)
        for rank in range(layout.cp)
        for index, segment in enumerate(runs(layout, rank, total))
    ]
    return Chain(tuple((rank, index) for _, rank, index in sorted(starts)))
