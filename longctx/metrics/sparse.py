"""What sparse layers selected and moved since the last step, as metrics: union density, skipped bytes, distances."""

from collections.abc import Sequence
from typing import Protocol

from longctx.parallel.cost import in_bytes


class Moved(Protocol):
    """What one layer moved: `sparse_attention.Movement`."""

    @property
    def moves(self) -> str: ...

    @property
    def density(self) -> float: ...

    @property
    def distances(self) -> tuple[int, ...]: ...

    @property
    def sent(self) -> tuple[int, int]:
        """Return the bytes that were sent, and those that dense attention would have sent."""
        ...


class SparseMonitor:
    """Collect, by kind of layer, what the forward passes of a step tell; `take` gives it away and begins anew."""

    def __init__(self) -> None:
        self._moved: dict[str, list[Moved]] = {}

    def add(self, kind: str, moved: Moved) -> None:
        """Add one layer's."""
        self._moved.setdefault(kind, []).append(moved)

    def take(self) -> "SparseSummary":
        """Return what was added since the last time."""
        moved, self._moved = self._moved, {}
        return SparseSummary(moved)


class SparseSummary:
    """A step's, over layers and micro-batches, of the ranks that share this one's sequences (and heads)."""

    def __init__(self, moved: dict[str, list[Moved]]) -> None:
        self._moved = moved

    def metrics(self) -> dict[str, float]:
        """Return numbers by name, `sparse/<kind>/...`.

        union_density: tokens of other ranks that some query selected, over those that the causal mask shows.
        sent_bytes, skipped_bytes: K/V and their gradients, forward and backward, of all ranks; and what they would
        have sent besides without selection. distance_N: the share of selected slots that lie N to 2 N - 1 blocks back.
        """
        found: dict[str, float] = {}
        for kind, each in self._moved.items():
            sent, whole, density = _together(each)
            counts = [sum(column) for column in zip(*(moved.distances for moved in each), strict=True)]
            found[f"sparse/{kind}/union_density"] = density
            found[f"sparse/{kind}/sent_bytes"] = sent
            found[f"sparse/{kind}/skipped_bytes"] = whole - sent
            found |= {f"sparse/{kind}/distance_{name}": share for name, share in _shares(counts).items()}
        return found

    def choices(self) -> dict[str, str]:
        """Return, for each kind, how K/V moved and why, in words."""
        told = {}
        for kind, ways in self.ways().items():
            sent, whole, density = _together(self._moved[kind])
            told[kind] = " and ".join(ways)
            if whole:
                told[kind] += f": union density {density:.0%}, {in_bytes(sent)} of {in_bytes(whole)} sent in this step"
        return told

    def ways(self) -> dict[str, tuple[str, ...]]:
        """Return the ways that were taken, by kind."""
        return {kind: tuple(sorted({moved.moves for moved in each})) for kind, each in self._moved.items()}


def _together(each: Sequence[Moved]) -> tuple[int, int, float]:
    """Return the bytes that were sent, those of dense attention, and the mean density."""
    sent, whole = (sum(moved.sent[part] for moved in each) for part in (0, 1))
    return sent, whole, sum(moved.density for moved in each) / len(each)


def _shares(counts: Sequence[int]) -> dict[int, float]:
    """Return the share of each distance that occurs up to the farthest: 0, 1, 2 (to 3), 4 (to 7), ..."""
    total, last = sum(counts), max((index for index, count in enumerate(counts) if count), default=-1)
    return {(0 if not index else 1 << (index - 1)): counts[index] / total for index in range(last + 1)}
