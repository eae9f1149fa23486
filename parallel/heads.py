"""Heads for tokens and back: the all-to-all of Ulysses (Jacobs et al., arXiv 2309.14509), inside one team.

Before it a rank has its own tokens and all heads, after it the tokens of its whole team and its share of the heads.
KV heads that do not divide by the team are repeated for the ranks that need them, and only for those.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd

import torch
from torch import Tensor

from longctx.parallel.teams import Order
from longctx.parallel.transport import Transport


@dataclass(frozen=True)
class HeadSplit:
    """Which heads each of `team` ranks computes.

    Attributes:
        heads, kv_heads: of the whole model; `team` divides `heads`, `kv_heads` divides `heads`.
    """

    heads: int
    kv_heads: int
    team: int

    def q(self, member: int) -> tuple[int, ...]:
        """Return a member's query heads."""
        share = self.heads // self.team
        return tuple(range(member * share, (member + 1) * share))

    def kv(self, member: int) -> tuple[int, ...]:
        """Return a member's KV heads in the order of its query heads: each serves equally many of them.

        One may appear twice, where a group of query heads ends inside another member's share.
        """
        group, share = self.heads // self.kv_heads, self.heads // self.team
        served = gcd(group, share)  # query heads in a row with one KV head, on every member alike
        return tuple(head // group for head in self.q(member)[::served])

    @property
    def repeats_kv(self) -> bool:
        """Tell whether some KV head is sent to more than one member, so that its gradients must be summed."""
        return self.team * len(self.kv(0)) > self.kv_heads


def to_heads(
    team: Transport, tensors: Sequence[Tensor], shares: Sequence[Sequence[Sequence[int]]], order: Order | None
) -> list[Tensor]:
    """Give every member its heads of this rank's tokens (one exchange for all tensors).

    Args:
        tensors: each `[B, n, H, D]`, any number of heads.
        shares: for each tensor, the heads of each member.
        order: in which the team holds its tokens (`team_order`).

    Returns:
        each `[B, team.size * n, h, D]` with this rank's heads.
    """
    if team.size == 1:
        return list(tensors)
    members = [member for member in range(team.size) if member != team.rank]
    outgoing = {m: [_heads(x, share[m]) for x, share in zip(tensors, shares, strict=True)] for m in members}
    own = [_heads(x, share[team.rank]) for x, share in zip(tensors, shares, strict=True)]
    incoming = {m: [torch.empty_like(x, memory_format=torch.contiguous_format) for x in own] for m in members}
    team.exchange(outgoing, incoming).wait()
    incoming[team.rank] = own
    whole = [torch.cat([incoming[m][i] for m in range(team.size)], dim=1) for i in range(len(own))]
    return whole if order is None else [x.index_select(1, order.there) for x in whole]


def to_tokens(
    team: Transport, tensors: Sequence[Tensor], shares: Sequence[Sequence[Sequence[int]]], order: Order | None
) -> list[Tensor]:
    """Give every member its tokens of this rank's heads: the inverse of `to_heads`, summing heads that were repeated.

    Args:
        tensors: each `[B, team.size * n, h, D]`, in the team's order.

    Returns:
        each `[B, n, H, D]` with all heads.
    """
    if team.size == 1:
        return list(tensors)
    if order is not None:
        tensors = [x.index_select(1, order.back) for x in tensors]
    parts = [x.chunk(team.size, dim=1) for x in tensors]
    members = [member for member in range(team.size) if member != team.rank]
    outgoing = {m: [part[m].contiguous() for part in parts] for m in members}
    incoming = {m: [torch.empty_like(part) for part in outgoing[m]] for m in members}
    team.exchange(outgoing, incoming).wait()
    incoming[team.rank] = [part[team.rank] for part in parts]
    return [_gathered([incoming[m][i] for m in range(team.size)], share) for i, share in enumerate(shares)]


def _heads(x: Tensor, heads: Sequence[int]) -> Tensor:
    if list(heads) == list(range(heads[0], heads[-1] + 1)):
        return x[:, :, heads[0] : heads[-1] + 1]
    return torch.stack([x[:, :, head] for head in heads], dim=2)


def _gathered(parts: Sequence[Tensor], shares: Sequence[Sequence[int]]) -> Tensor:
    """Put heads back in order, adding those that came more than once, in the order of the members."""
    heads = [head for share in shares for head in share]
    together = torch.cat(list(parts), dim=2)
    if heads == list(range(len(heads))):
        return together
    whole = together.new_zeros((*together.shape[:2], 1 + max(heads), together.shape[3]))
    for index, head in enumerate(heads):
        whole[:, :, head] += together[:, :, index]
    return whole
