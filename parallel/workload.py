"""Workload: how much every team computes with every team's keys, counted once for all schedules with these teams.

Integers from the plan (`plan.py`). Counting costs about 10 microseconds x cp^2 x documents for a token-striped layout,
where every rank has some of every document; then a few documents stand for all of them.
"""

import dataclasses
from dataclasses import dataclass
from itertools import accumulate, pairwise

from longctx.kernels.mask import HeadMasks, Mask, plain_masks
from longctx.parallel.balance import visible_pairs
from longctx.parallel.layout import Layout
from longctx.parallel.needs import Needs, needs_of
from longctx.parallel.plan import AnyMask, plan
from longctx.parallel.schedule import Schedule
from longctx.parallel.teams import Teams

COUNT_LIMIT = 50_000  # cp^2 x documents that are counted, for each layout


@dataclass(frozen=True)
class Workload:
    """What is computed, by `[member of the team][team of the queries][team of the keys]`.

    Attributes:
        pairs: visible (query, key) pairs times the query heads of the rank.
        calls: tiles.
        sampled: documents that stand for all; None = all were counted.
    """

    layout: Layout
    total: int
    teams: Teams
    needs: Needs
    pairs: tuple[tuple[tuple[float, ...], ...], ...]
    calls: tuple[tuple[tuple[float, ...], ...], ...]
    sampled: int | None

    @property
    def total_pairs(self) -> float:
        """Return all pairs of all heads."""
        return sum(sum(row) for member in self.pairs for row in member) * (self.teams.size // len(self.pairs))

    def of(self, member: int, queries: int, keys: int) -> tuple[float, float]:
        """Return pairs and calls of a rank; members of a team do the same unless heads have masks of their own."""
        index = member if len(self.pairs) > 1 else 0
        return self.pairs[index][queries][keys], self.calls[index][queries][keys]


class Counter:
    """Workloads of one sequence under one mask."""

    def __init__(self, mask: AnyMask, *, total: int, heads: int, limit: int = COUNT_LIMIT) -> None:
        """Remember what to count.

        Args:
            heads: query heads of the layer.
            limit: cp^2 x documents from which on some documents stand for all.
        """
        self.mask, self.total, self.heads, self.limit = mask, total, heads, limit
        self._known: dict[tuple[Layout, Teams], Workload] = {}

    @property
    def documents(self) -> int:
        """Return the number of documents."""
        return max(len(each.document_bounds(self.total)) - 1 for each in plain_masks(self.mask))

    def workload(self, layout: Layout, schedule: Schedule) -> Workload:
        """Return the work of a layout with the teams of a schedule."""
        teams = schedule.teams(layout.cp)
        known = self._known.get((layout, teams))
        if known is None:
            known = self._known[layout, teams] = self._count(layout, schedule, teams)
        return known

    def _count(self, layout: Layout, schedule: Schedule, teams: Teams) -> Workload:
        mask, total, sampled, scale, tile_scale = self.mask, self.total, None, 1.0, 1.0
        documents = self.documents
        keep = max(self.limit // layout.cp**2, 1)
        if layout.name == "striped" and layout.width == 1 and documents > keep:
            sample = sampled_documents(mask, total, keep=keep, multiple_of=layout.cp)
            if sample is not None:
                mask, total = sample
                sampled = keep
                scale = visible_pairs(self.mask, total=self.total) / max(visible_pairs(mask, total=total), 1)
                tile_scale = documents / keep
        members = range(teams.size) if isinstance(mask, HeadMasks) else (0,)
        per_head = self.heads // teams.size
        pairs, calls = [], []
        for member in members:
            rows: list[tuple[float, ...]] = []
            tiles: list[tuple[float, ...]] = []
            for team in range(teams.count):
                rank = teams.members[team][member]
                hops = plan.__wrapped__(layout, (mask,), schedule, rank=rank, total=total).hops
                by_source = sorted(hops, key=lambda hop: hop.source)
                rows.append(
                    tuple(
                        scale * sum(each.pairs * (1 if each.heads else per_head) for each in hop.lists)
                        for hop in by_source
                    )
                )
                tiles.append(tuple(tile_scale * sum(len(each.tiles) for each in hop.lists) for hop in by_source))
            pairs.append(tuple(rows))
            calls.append(tuple(tiles))
        needs = needs_of(layout, (self.mask,), teams, total=self.total)
        return Workload(layout, self.total, teams, needs, tuple(pairs), tuple(calls), sampled)


def sampled_documents(mask: AnyMask, total: int, *, keep: int, multiple_of: int) -> tuple[AnyMask, int] | None:
    """Return the mask of a shorter sequence of about `keep` of the documents, and its length.

    Documents are taken at even distances in the order of their lengths, so that short and long ones keep their shares;
    the last one is lengthened to a multiple of `multiple_of` tokens. None where a mask speaks of its documents one by
    one (a prefix for each), or has predicates.
    """
    if isinstance(mask, HeadMasks):
        bounds = {each.document_bounds(total) for each in mask.masks}
        shorter = [sampled_documents(each, total, keep=keep, multiple_of=multiple_of) for each in mask.masks]
        if len(bounds) > 1 or any(each is None for each in shorter):
            return None
        found = [each for each in shorter if each is not None]
        return HeadMasks(tuple(each[0] for each in found if isinstance(each[0], Mask))), found[0][1]
    if not mask.banded or any(isinstance(part.first, tuple) for part in mask.parts):
        return None
    lengths = sorted(end - begin for begin, end in pairwise(mask.document_bounds(total)))
    keep = min(keep, len(lengths))
    chosen = [lengths[(2 * index + 1) * len(lengths) // (2 * keep)] for index in range(keep)]
    chosen[-1] += -sum(chosen) % multiple_of
    shorter_bounds = (0, *accumulate(chosen))
    return dataclasses.replace(mask, cu_seqlens=shorter_bounds), shorter_bounds[-1]
