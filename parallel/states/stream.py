"""States that go down the chain from link to link: each rank takes one in, applies its own map, and passes it on.

`ring` sends a state as a whole (LASP, arXiv 2404.02882). `pipelined` cuts it along V into blocks that follow each other
closely (the All-Scan of ZeCO, arXiv 2507.01004, which cuts along K): columns of a state do not mix in `M S + R`, for
any transition. A chain of L links takes the time of `splits + L - 2` blocks then, rather than of `splits (L - 1)`.

    tick     0        1        2            three ranks, two blocks: rank 1 sends the first one on
    0 -> 1   block 0  block 1               while it receives the second
    1 -> 2            block 0  block 1

Only states travel. Of the link at `place`, block j leaves at tick `place + j`: both ends know that, and whatever a rank
sends and receives at a tick is one exchange, so no order of messages can make two ranks wait for each other.
"""

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

from longctx.kernels.linear.affine import Affine, apply
from longctx.parallel.chain import Chain
from longctx.parallel.schedule import Sent
from longctx.parallel.transport import Exchange, Transport

Block = tuple[int, int]  # (place of a link, index of a block of columns)


@dataclass(frozen=True)
class Ring:
    """Pass whole states on."""

    name: str = "ring"

    def incoming(self, summary: Affine, *, chain: Chain, transport: Transport) -> Tensor:
        """Return the state that enters each segment of this rank, `[B, P, H, K, V]`."""
        return _stream(summary, chain=chain, transport=transport, splits=1)

    def sent(self, chain: Chain, rank: int, *, transition_bytes: int, state_bytes: int) -> Sent:
        """Count a state for every link of this rank whose successor is another rank's."""
        return _sent(chain, rank, splits=1, state_bytes=state_bytes)


@dataclass(frozen=True)
class Pipelined:
    """Pass states on block by block.

    Attributes:
        splits: blocks of columns, at most V.
    """

    splits: int = 4
    name: str = "pipelined"

    def incoming(self, summary: Affine, *, chain: Chain, transport: Transport) -> Tensor:
        """Return the state that enters each segment of this rank, `[B, P, H, K, V]`."""
        width = summary.state.shape[-1]
        if self.splits > width:
            raise ValueError(f"attention.state_splits={self.splits} must be at most V = {width}, the dim that is split")
        return _stream(summary, chain=chain, transport=transport, splits=self.splits)

    def sent(self, chain: Chain, rank: int, *, transition_bytes: int, state_bytes: int) -> Sent:
        """Count the bytes of `ring`, in more hops."""
        return _sent(chain, rank, splits=self.splits, state_bytes=state_bytes)


def _stream(summary: Affine, *, chain: Chain, transport: Transport, splits: int) -> Tensor:
    rank, segment_at = transport.rank, dict(chain.walk(transport.rank))
    pieces = summary.state.tensor_split(splits, dim=-1)
    states: dict[Block, Tensor] = {}
    if 0 in segment_at:
        states.update({(0, index): torch.zeros_like(piece[:, 0]) for index, piece in enumerate(pieces)})
    posted: list[Exchange] = []
    arriving: Exchange | None = None
    for leaving, coming in _ticks(chain, rank, splits).values():
        if arriving is not None:
            arriving.wait()
            arriving = None
        outgoing: dict[int, list[Tensor]] = defaultdict(list)
        incoming: dict[int, list[Tensor]] = defaultdict(list)
        for place, index in leaving:
            segment = segment_at[place]
            state = apply(summary.transition[:, segment], states[place, index]) + pieces[index][:, segment]
            if chain.owner(place + 1) == rank:
                states[place + 1, index] = state
            else:
                outgoing[chain.owner(place + 1)].append(state)
        for place, index in coming:
            states[place, index] = torch.empty_like(pieces[index][:, 0], memory_format=torch.contiguous_format)
            incoming[chain.owner(place - 1)].append(states[place, index])
        if outgoing or incoming:
            exchange = transport.exchange(outgoing, incoming)
            arriving = exchange if incoming else None
            posted.append(exchange)
    for exchange in posted:
        exchange.wait()
    whole = [torch.cat([states[place, index] for index in range(splits)], dim=-1) for place in chain.places(rank)]
    return torch.stack(whole, dim=1)


def _sent(chain: Chain, rank: int, *, splits: int, state_bytes: int) -> Sent:
    successors = [chain.owner(place + 1) for place in chain.places(rank) if place + 1 < len(chain)]
    peers = sorted({peer for peer in successors if peer != rank})
    hops = sum(
        any(chain.owner(place + 1) != rank for place, _ in leaving) or bool(coming)
        for leaving, coming in _ticks(chain, rank, splits).values()
    )
    return Sent(hops, {peer: successors.count(peer) * state_bytes for peer in peers})


def _ticks(chain: Chain, rank: int, splits: int) -> dict[int, tuple[list[Block], list[Block]]]:
    """Return at each tick the blocks that leave links of this rank, and those that come from other ranks."""
    ticks: dict[int, tuple[list[Block], list[Block]]] = defaultdict(lambda: ([], []))
    for place, _ in chain.walk(rank):
        for index in range(splits):
            if place + 1 < len(chain):
                ticks[place + index][0].append((place, index))
            if place > 0 and chain.owner(place - 1) != rank:
                ticks[place - 1 + index][1].append((place, index))
    return dict(sorted(ticks.items()))
