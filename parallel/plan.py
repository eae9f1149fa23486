"""The plan: for each rank and hop, the tiles to compute. Pure integers, printable, testable without processes.

Kernels get its tiles; the trainer and the tests read its sums: work, balance, hops that compute nothing. Hop 0 is the
own shard, for which nothing is exchanged.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from longctx.kernels.mask import Mask
from longctx.kernels.positions import Tile, cut, total_pairs
from longctx.kernels.tiles import tiles_between
from longctx.parallel.layout import Layout
from longctx.parallel.schedule import Schedule

BALANCE_LIMIT = 200_000  # hops x documents of all ranks that `describe` goes through


@dataclass(frozen=True)
class Hop:
    """One rank's work while it holds the K/V shard of `source`."""

    source: int
    tiles: tuple[Tile, ...]

    @property
    def pairs(self) -> int:
        return total_pairs(self.tiles)


@dataclass(frozen=True)
class Plan:
    """All hops of one rank, which owns `tokens` tokens of the sequence in `layout`."""

    layout: Layout
    rank: int
    tokens: int
    hops: tuple[Hop, ...]

    def tiles_of(self, source: int) -> tuple[Tile, ...]:
        """Return the tiles against `source`'s shard."""
        for hop in self.hops:
            if hop.source == source:
                return hop.tiles
        raise AssertionError(f"rank {self.rank} never holds the shard of rank {source}")

    @property
    def num_tiles(self) -> int:
        """Return the number of tiles of all hops: kernel calls per layer, for kernels that make one per tile."""
        return sum(len(hop.tiles) for hop in self.hops)


# Few: with packed documents every sequence has a mask, and so a plan, of its own. Layers share the object.
@lru_cache(maxsize=8)
def plan(layout: Layout, mask: Mask, schedule: Schedule, *, rank: int, total: int) -> Plan:
    """Return what `rank` computes at each hop, for a sequence of `total` tokens."""
    bounds = mask.bounds(total)
    queries = cut(layout.segments(rank, total), bounds)
    hops = []
    for source in schedule.sources(rank, layout.cp):
        keys = queries if source == rank else cut(layout.segments(source, total), bounds)
        hops.append(Hop(source, tiles_between(queries, keys, mask=mask)))
    return Plan(layout, rank, total // layout.cp, tuple(hops))


@dataclass(frozen=True)
class Balance:
    """Work of all ranks: `pairs[rank][hop]` visible (query, key) pairs."""

    pairs: tuple[tuple[int, ...], ...]

    @property
    def total(self) -> int:
        """Return all visible pairs of the sequence."""
        return sum(map(sum, self.pairs))

    @property
    def efficiency(self) -> float:
        """Return ideal / critical path: (total / ranks) over the sum over hops of the busiest rank's pairs."""
        critical = sum(max(hop) for hop in zip(*self.pairs, strict=True))
        return self.total / len(self.pairs) / critical if critical else 1.0

    @property
    def imbalance(self) -> float:
        """Return the busiest rank's total work over the mean."""
        mean = self.total / len(self.pairs)
        return max(map(sum, self.pairs)) / mean if mean else 1.0

    @property
    def idle_hops(self) -> float:
        """Return the share of (rank, hop) with nothing to compute."""
        flat = [pairs for rank in self.pairs for pairs in rank]
        return sum(pairs == 0 for pairs in flat) / len(flat)


def balance(layout: Layout, mask: Mask, schedule: Schedule, *, total: int) -> Balance:
    """Count every rank's work per hop. Costs cp plans."""
    plans = (plan.__wrapped__(layout, mask, schedule, rank=rank, total=total) for rank in range(layout.cp))
    return Balance(tuple(tuple(hop.pairs for hop in one.hops) for one in plans))


def describe(layout: Layout, mask: Mask, schedule: Schedule, *, total: int) -> str:
    """Return the plan of a sequence in one line.

    Counting all ranks' work costs about 10 microseconds x cp^2 x documents; where that is more than a few seconds,
    rank 0's work alone is told.
    """
    documents = 1 if mask.cu_seqlens is None else len(mask.cu_seqlens) - 1
    first = plan(layout, mask, schedule, rank=0, total=total)
    what = (
        f"{layout.describe()} x {schedule.name}, cp={layout.cp}, {total:,} tokens, {documents} document(s), "
        f"{first.num_tiles:,} tile(s) per layer on rank 0: "
    )
    if layout.cp**2 * documents > BALANCE_LIMIT:
        return f"{what}{sum(hop.pairs for hop in first.hops):,} visible pairs on rank 0, other ranks not counted"
    work = balance(layout, mask, schedule, total=total)
    return (
        f"{what}{work.total:,} visible pairs, balance {work.efficiency:.1%} of ideal, "
        f"busiest rank {work.imbalance:.2f}x the mean, {work.idle_hops:.0%} of hops idle"
    )


def visible_pairs(mask: Mask, *, total: int) -> int:
    """Return the visible pairs of a whole sequence under a mask, without any layout."""
    whole = cut(Layout("contiguous", 1).segments(0, total), mask.bounds(total))
    return total_pairs(tiles_between(whole, whole, mask=mask))


def plans_for(layout: Layout, masks: Sequence[Mask], schedule: Schedule, *, rank: int, total: int) -> tuple[Plan, ...]:
    """Return one plan per batch row, or a single one where all rows have the same mask."""
    distinct = masks[:1] if all(mask == masks[0] for mask in masks) else masks
    return tuple(plan(layout, mask, schedule, rank=rank, total=total) for mask in distinct)
