"""Who holds which heads of which tokens while attention runs: the schedule's teams, seen from one rank."""

from dataclasses import dataclass

import torch

from longctx.parallel.heads import HeadSplit
from longctx.parallel.layout import Layout
from longctx.parallel.schedule import Schedule
from longctx.parallel.teams import Order, Teams, team_order
from longctx.parallel.transport import Among, Transport


@dataclass(frozen=True, kw_only=True)
class Arrangement:
    """One rank's place among the ranks that share `total` tokens and the heads of `split`."""

    layout: Layout
    schedule: Schedule
    transport: Transport
    split: HeadSplit
    total: int

    @property
    def teams(self) -> Teams:
        """Return which ranks share heads."""
        return self.schedule.teams(self.layout.cp)

    @property
    def members(self) -> tuple[int, ...]:
        """Return the ranks of this one's team."""
        return self.teams.members[self.teams.place(self.transport.rank)[0]]

    @property
    def team(self) -> Transport:
        """Return the ranks that share heads with this one."""
        return Among(self.transport, self.members)

    @property
    def ring(self) -> Transport:
        """Return the ranks that have this one's heads, one per team."""
        return Among(self.transport, self.teams.counterparts(self.transport.rank))

    @property
    def own_heads(self) -> slice:
        """Return this rank's query heads."""
        own = self.split.q(self.team.rank)
        return slice(own[0], own[-1] + 1)

    @property
    def shares(self) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
        """Return each member's query heads and KV heads."""
        members = range(self.split.team)
        return [self.split.q(member) for member in members], [self.split.kv(member) for member in members]

    def order(self, device: torch.device) -> Order | None:
        """Return in which order the team holds its tokens."""
        return team_order(self.layout, self.members, self.total, device)
