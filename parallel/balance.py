"""Balance: every rank's work at every hop, before anything runs. Integers only."""

from collections.abc import Sequence
from dataclasses import dataclass

from longctx.kernels.mask import HeadMasks, plain_masks
from longctx.kernels.positions import cut, total_pairs
from longctx.kernels.tiles import tiles_between
from longctx.parallel.cost import in_bytes, traffic
from longctx.parallel.layout import Layout
from longctx.parallel.plan import AnyMask, Plan, plan
from longctx.parallel.schedule import Schedule, Shape

BALANCE_LIMIT = 200_000  # hops x documents of all ranks that `describe` goes through
MANY_RANKS = 32  # above, what is sent is told of rank 0 alone: counting it for all costs about cp^3 microseconds


@dataclass(frozen=True)
class Balance:
    """Work of all ranks: `pairs[rank][hop]` visible (query, key) pairs; ranks of a team count once, since they share
    their heads, unless heads have masks of their own."""

    pairs: tuple[tuple[int, ...], ...]

    @property
    def total(self) -> int:
        """Return all visible pairs of the sequence (times heads, where masks differ by head)."""
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


def balance(layout: Layout, masks: Sequence[AnyMask], schedule: Schedule, *, total: int) -> Balance:
    """Count every rank's work per hop. Costs cp plans.

    Schedules that do not go in lockstep wait for each other once, so their hops count as one.
    """
    return balance_of(plans_of_all_ranks(layout, masks, schedule, total=total))


def plans_of_all_ranks(layout: Layout, masks: Sequence[AnyMask], schedule: Schedule, *, total: int) -> tuple[Plan, ...]:
    """Return the plans of all ranks whose work differs, uncached."""
    teams = schedule.teams(layout.cp)
    per_head = any(isinstance(mask, HeadMasks) for mask in masks)
    ranks = range(layout.cp) if per_head else (members[0] for members in teams.members)
    return tuple(plan.__wrapped__(layout, tuple(masks), schedule, rank=rank, total=total) for rank in ranks)


def balance_of(plans: Sequence[Plan]) -> Balance:
    """Sum up the plans of all ranks."""
    pairs = tuple(tuple(hop.pairs for hop in one.hops) for one in plans)
    return Balance(pairs if plans[0].schedule.lockstep else tuple((sum(hops),) for hops in pairs))


def describe(
    layout: Layout, masks: Sequence[AnyMask], schedule: Schedule, *, total: int, shape: Shape | None = None
) -> str:
    """Return the plan of a batch in a line or two.

    Counting all ranks' work costs about 10 microseconds x cp^2 x documents; where that is more than a few seconds,
    rank 0's work alone is told.

    Args:
        shape: the heads of a layer, to tell what is sent too (by the rank that sends most).
    """
    documents = max(len(each.document_bounds(total)) - 1 for mask in masks for each in plain_masks(mask))
    countable = layout.cp**2 * documents <= BALANCE_LIMIT
    plans = plans_of_all_ranks(layout, masks, schedule, total=total) if countable else ()
    first = plans[0] if plans else plan(layout, tuple(masks), schedule, rank=0, total=total)
    what = (
        f"{layout.describe()} x {schedule.name}, cp={layout.cp}, {total:,} tokens, {documents} document(s), "
        f"{first.num_tiles:,} tile(s) per layer on rank 0: "
    )
    told = [f"{sum(hop.pairs for hop in first.hops):,} visible pairs on rank 0, other ranks not counted"]
    if plans:
        work = balance_of(plans)
        told = [
            f"{work.total:,} visible pairs, balance {work.efficiency:.1%} of ideal, busiest rank "
            f"{work.imbalance:.2f}x the mean, {work.idle_hops:.0%} of hops idle"
        ]
    if shape is not None and layout.cp > 1:
        few = plans and layout.cp <= MANY_RANKS
        told.append(_sends(plans if few else (first,), shape, batch=len(masks)))
    return what + "\n  ".join(told)


def _sends(plans: Sequence[Plan], shape: Shape, *, batch: int) -> str:
    """Say how many of the hops are made, and what a layer sends."""
    needed = [[b != a and span is not None for b, span in enumerate(row)] for a, row in enumerate(plans[0].needs.keys)]
    made, possible = sum(map(sum, needed)), len(needed) * (len(needed) - 1)
    passes = zip(*(traffic(one, shape, batch=batch) for one in plans), strict=True)
    forward, backward = (max(sent, key=lambda each: each.bytes) for sent in passes)
    who = "a rank sends at most" if len(plans) > 1 or len(needed) == 1 else "rank 0 sends"
    hops = f"{made} of {possible} hops needed; " if possible else ""
    return (
        f"{hops}per layer {who} {in_bytes(forward.bytes)} in {forward.hops} exchange(s) forward, "
        f"{in_bytes(backward.bytes)} in {backward.hops} backward"
    )


def visible_pairs(mask: AnyMask, *, total: int) -> int:
    """Return the visible pairs of a whole sequence under a mask, without any layout; the mean over its heads."""
    if isinstance(mask, HeadMasks):
        return round(sum(visible_pairs(each, total=total) for each in mask.masks) / len(mask.masks))
    whole = cut(Layout("contiguous", 1).segments(0, total), mask.bounds(total))
    return total_pairs(tiles_between(whole, whole, mask=mask, total=total))
