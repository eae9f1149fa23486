"""Teams: ranks that hold their tokens together and share the heads between them (Ulysses), and their common shard.

A schedule splits the cp ranks into teams of equal size. A team of one is a rank with its own tokens and all heads:
plain ring. One team of all ranks is Ulysses. Everything in between is USP: K/V travel from team to team.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from longctx.kernels.positions import Segment
from longctx.parallel.layout import Layout

Strip = tuple[Segment, ...]


@dataclass(frozen=True)
class Teams:
    """All ranks of a group by team; `members[team][member]` is a rank."""

    members: tuple[tuple[int, ...], ...]

    @property
    def count(self) -> int:
        """Return the number of teams: what travels, travels between them."""
        return len(self.members)

    @property
    def size(self) -> int:
        """Return the number of ranks of a team, over which heads are split."""
        return len(self.members[0])

    def place(self, rank: int) -> tuple[int, int]:
        """Return (team, member) of a rank."""
        for team, members in enumerate(self.members):
            if rank in members:
                return team, members.index(rank)
        raise AssertionError((rank, self))

    def counterparts(self, rank: int) -> tuple[int, ...]:
        """Return the ranks that have this rank's heads, one of each team."""
        member = self.place(rank)[1]
        return tuple(members[member] for members in self.members)


def single_ranks(size: int) -> Teams:
    """Return teams of one."""
    return Teams(tuple((rank,) for rank in range(size)))


def neighbours(size: int, team: int) -> Teams:
    """Return teams of ranks next to each other: (0, 1, ...), (team, team + 1, ...), ..."""
    return Teams(tuple(tuple(range(first, first + team)) for first in range(0, size, team)))


def spread(size: int, team: int) -> Teams:
    """Return teams of ranks `size / team` apart: (0, size / team, ...), (1, ...), ..."""
    count = size // team
    return Teams(tuple(tuple(range(first, size, count)) for first in range(count)))


@lru_cache(maxsize=1024)
def team_shard(layout: Layout, members: tuple[int, ...], total: int) -> tuple[Strip, ...]:
    """Return a team's tokens as strips of ascending segments, in the order in which the team holds them.

    One strip, in position order, where that takes few segments: always but for token-striped ranks next to each other,
    whose union is no arithmetic progression; they stay member by member, a strip each.
    """
    segments = [segment for rank in members for segment in layout.segments(rank, total)]
    if all(segment.stride == 1 or segment.count == 1 for segment in segments):
        return (_joined(sorted(segments, key=lambda segment: segment.start)),)
    segments.sort(key=lambda segment: segment.start)
    strides = {segment.stride for segment in segments}
    counts = {segment.count for segment in segments}
    steps = {b.start - a.start for a, b in pairwise(segments)}
    if len(segments) == 1:
        return (tuple(segments),)
    if len(strides) == len(counts) == len(steps) == 1 and steps == {strides.copy().pop() // len(segments)}:
        return ((Segment(segments[0].start, steps.pop(), sum(segment.count for segment in segments)),),)
    return tuple(layout.segments(rank, total) for rank in members)


class Order(NamedTuple):
    """How a team's tokens lie against its members' shards, one after the other; int64 indices.

    Attributes:
        there: where each token of the team's order is among the members' tokens.
        back: the inverse.
    """

    there: Tensor
    back: Tensor


@lru_cache(maxsize=16)  # on the device: at a million tokens it is 8 MB, for every layer
def team_order(layout: Layout, members: tuple[int, ...], total: int, device: torch.device) -> Order | None:
    """Return the order in which a team holds its tokens, or None if that is member by member."""
    if len(members) == 1 or len(team_shard(layout, members, total)) > 1:
        return None
    positions = torch.cat([layout.positions(rank, total) for rank in members])
    there = torch.argsort(positions)
    if torch.equal(there, torch.arange(len(there))):
        return None
    return Order(there.to(device), torch.argsort(there).to(device))


def _joined(segments: list[Segment]) -> Strip:
    """Join ascending segments of stride 1 that follow each other without a gap."""
    joined: list[Segment] = []
    for segment in segments:
        before = joined[-1] if joined else None
        if before is not None and before.last + 1 == segment.start:
            joined[-1] = Segment(before.start, 1, before.count + segment.count)
        else:
            joined.append(Segment(segment.start, 1, segment.count))
    return tuple(joined)


def part_of(segments: Strip, begin: int, end: int) -> Strip:
    """Return local indices `[begin, end)` of a strip."""
    parts, offset = [], 0
    for segment in segments:
        first, last = max(begin - offset, 0), min(end - offset, segment.count)
        if first < last:
            parts.append(segment.part(first, last))
        offset += segment.count
    return tuple(parts)
