"""Demand: which blocks of the sequence each team of ranks needs of the others, when that is known from data alone.

What a mask needs is known before anything runs (`needs.py`); what routed attention selects is known when it has been
selected. Every team then tells the others a bit per block, and from those bits all ranks derive the same messages:
spans for a schedule, or exactly the blocks that are needed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from longctx.kernels.positions import Segment
from longctx.parallel.layout import Layout
from longctx.parallel.needs import Needs, Span
from longctx.parallel.schedule import Sent, Shape
from longctx.parallel.teams import Teams, team_shard
from longctx.parallel.transport import Transport


@dataclass(frozen=True, eq=False)
class Shards:
    """The tokens of all teams, and the blocks that they lie in. On the CPU.

    Attributes:
        positions: int64 `[T]` of each team, in the order in which it holds its tokens.
        block_size: tokens of a block; a team may hold parts of blocks.
        count: blocks of the sequence.
    """

    positions: tuple[Tensor, ...]
    block_size: int
    count: int

    @cached_property
    def blocks(self) -> tuple[Tensor, ...]:
        """Return the block of each token of each team."""
        return tuple(places // self.block_size for places in self.positions)

    @cached_property
    def runs(self) -> tuple[tuple[Tensor, Tensor, Tensor], ...]:
        """Return each team's runs of tokens of one block: the block, and where they begin and end, int64 `[runs]`."""
        found = []
        for blocks in self.blocks:
            block, lengths = torch.unique_consecutive(blocks, return_counts=True)
            end = lengths.cumsum(0)
            found.append((block, end - lengths, end))
        return tuple(found)

    @cached_property
    def owned(self) -> Tensor:
        """Return how many tokens of each block each team has: int64 `[teams, count]`."""
        return torch.stack([torch.bincount(blocks, minlength=self.count) for blocks in self.blocks])


@lru_cache(maxsize=32)
def shards_of(layout: Layout, teams: Teams, *, total: int, block_size: int) -> Shards:
    """Return the tokens of all teams."""
    positions = tuple(
        torch.cat([_places(segment) for strip in team_shard(layout, members, total) for segment in strip])
        for members in teams.members
    )
    return Shards(positions, block_size, -(-total // block_size))


def _places(segment: Segment) -> Tensor:
    return segment.start + segment.stride * torch.arange(segment.count, dtype=torch.int64)


@dataclass(frozen=True, eq=False)
class Demand:
    """Which blocks each team's queries need, wherever they lie.

    Attributes:
        wanted: bool `[teams, blocks]`, on the CPU, the same on all ranks.
    """

    shards: Shards
    wanted: Tensor

    def tokens(self, team: int, source: int) -> Tensor:
        """Return the local indices of the tokens of `source` that `team` needs, int64."""
        return torch.nonzero(self.wanted[team][self.shards.blocks[source]])[:, 0]

    @cached_property
    def counts(self) -> Tensor:
        """Return how many tokens each team needs of each source: int64 `[team, source]`."""
        exact = self.wanted.to(torch.float64) @ self.shards.owned.T.to(torch.float64)  # integers, and much faster
        return exact.to(torch.int64)

    @cached_property
    def needs(self) -> Needs:
        """Return the demand as spans: from the first to the last needed token of each shard."""
        count = range(len(self.shards.positions))
        spans = [self._spans(source) for source in count]
        keys = tuple(tuple(spans[source][team] for source in count) for team in count)
        return Needs(keys, queries=())

    @cached_property
    def moved(self) -> int:
        """Return how many tokens of others all teams need together."""
        return int(self.counts.sum() - self.counts.diagonal().sum())

    def sent(self, team: int, shape: Shape) -> tuple[Sent, Sent]:
        """Return what a rank of `team` sends to other teams if exactly the needed blocks are exchanged, per row.

        Forward k and v of what others need; backward the same, and dk and dv of what it needed itself.
        """
        count = len(self.shards.positions)
        others = [peer for peer in range(count) if peer != team]
        given = {peer: tokens for peer in others if (tokens := int(self.counts[peer, team]))}
        taken = {peer: tokens for peer in others if (tokens := int(self.counts[team, peer]))}
        low, wide = shape.kv_token_bytes
        hops = len({(peer - team) % count for peer in given} | {(team - peer) % count for peer in taken})
        back = {peer: given.get(peer, 0) * low + taken.get(peer, 0) * wide for peer in sorted({*given, *taken})}
        return Sent(hops, {peer: tokens * low for peer, tokens in given.items()}), Sent(2 * hops, back)

    def sent_by_all(self, shape: Shape) -> int:
        """Return the bytes of `sent`, of both passes and of one rank of each team together."""
        low, wide = shape.kv_token_bytes
        return self.moved * (2 * low + wide)

    def _spans(self, source: int) -> list[Span | None]:
        """Return what each team needs of a source."""
        block, begin, end = self.shards.runs[source]
        needed = self.wanted[:, block].to(torch.uint8)  # [teams, runs]
        first = begin[needed.argmax(1)].tolist()
        last = end[len(block) - 1 - needed.flip(1).argmax(1)].tolist()
        return [(a, b) if some else None for a, b, some in zip(first, last, needed.any(1).tolist(), strict=True)]


def agree(ring: Transport, mine: Tensor, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Tell all teams a bit per block and a few numbers, and return everybody's (one exchange).

    Args:
        ring: the ranks that have this one's heads, one per team.
        mine: bool `[blocks]`.
        numbers: >= 0.

    Returns:
        bool `[teams, blocks]` and int64 `[teams, numbers]`, on the CPU.
    """
    count = len(mine)
    padded = torch.zeros(-(-count // 8) * 8, dtype=torch.uint8)
    padded[:count] = mine.to("cpu", torch.uint8)
    packed = (padded.view(-1, 8) << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)
    message = torch.cat([packed, torch.tensor(list(numbers), dtype=torch.int64).view(torch.uint8)])
    everybody = {ring.rank: message}
    if ring.size > 1:
        device = mine.device  # what the group's backend can send
        peers = [peer for peer in range(ring.size) if peer != ring.rank]
        coming = {peer: [torch.empty_like(message, device=device)] for peer in peers}
        own = message.to(device)
        ring.exchange({peer: [own] for peer in peers}, coming).wait()
        everybody |= {peer: tensors[0].cpu() for peer, tensors in coming.items()}
    rows = [everybody[rank] for rank in range(ring.size)]
    bits = torch.stack([row[: len(packed)] for row in rows])
    unpacked = (bits[:, :, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    told = torch.stack([row[len(packed) :].clone().view(torch.int64) for row in rows])
    return unpacked.flatten(1)[:, :count].bool(), told


def agreed_bytes(blocks: int, numbers: int) -> int:
    """Return the bytes that `agree` sends to each peer."""
    return -(-blocks // 8) + 8 * numbers
