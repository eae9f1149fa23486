"""Every rank gets the maps of all links before its own in one hop and folds them itself (LASP-2, arXiv 2502.07563).

LASP-2 gathers states alone, from all ranks and for all of them. Here transitions come along, and a link's map goes to
the ranks that have a later link, and to no others. Nothing precedes the first link, whose transition stays at home.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longctx.kernels.linear.affine import Affine, apply
from longctx.parallel.chain import Chain
from longctx.parallel.schedule import Sent
from longctx.parallel.transport import Transport

Given = tuple[tuple[int, int], ...]  # (place, local index at its owner) of links, in the order of the chain


@dataclass(frozen=True)
class AllGather:
    """Collect maps, then fold."""

    name: str = "all_gather"

    def incoming(self, summary: Affine, *, chain: Chain, transport: Transport) -> Tensor:
        """Return the state that enters each segment of this rank, `[B, P, H, K, V]`."""
        rank = transport.rank
        others = [peer for peer in chain.ranks if peer != rank]
        leaving = {peer: given for peer in others if (given := _given(chain, rank, peer))}
        coming = {peer: taken for peer in others if (taken := _given(chain, peer, rank))}
        outgoing = {peer: _message(summary, given) for peer, given in leaving.items()}
        incoming = {peer: _buffers(summary, taken) for peer, taken in coming.items()}
        if outgoing or incoming:
            transport.exchange(outgoing, incoming).wait()
        maps = {place: (summary, segment) for place, segment in chain.walk(rank)}
        for peer, taken in coming.items():
            part = _map_of(incoming[peer], taken)
            maps.update({place: (part, index) for index, (place, _) in enumerate(taken)})
        return _fold(maps, chain.places(rank))

    def sent(self, chain: Chain, rank: int, *, transition_bytes: int, state_bytes: int) -> Sent:
        """Count a map for every link of this rank and every other rank that has a later one."""
        others = [peer for peer in chain.ranks if peer != rank]
        bytes_to = {}
        for peer in others:
            if given := _given(chain, rank, peer):
                bytes_to[peer] = len(given) * state_bytes + _transitions(given) * transition_bytes
        return Sent(int(bool(bytes_to) or any(_given(chain, peer, rank) for peer in others)), bytes_to)


def _given(chain: Chain, owner: int, taker: int) -> Given:
    """Return the links of one rank that precede some link of another."""
    last = max(chain.places(taker))
    return tuple((place, segment) for place, segment in chain.walk(owner) if place < last)


def _transitions(given: Given) -> int:
    return sum(place > 0 for place, _ in given)


def _message(summary: Affine, given: Given) -> list[Tensor]:
    segments = [segment for _, segment in given]
    tensors = summary.state[:, segments], summary.transition[:, segments[len(given) - _transitions(given) :]]
    return [tensor for tensor in tensors if tensor.shape[1]]


def _buffers(like: Affine, taken: Given) -> list[Tensor]:
    """Return what a message is received into: states, and transitions if it has any."""
    counts = (like.state, len(taken)), (like.transition, _transitions(taken))
    return [x.new_empty((x.shape[0], count, *x.shape[2:])) for x, count in counts if count]


def _map_of(message: Sequence[Tensor], taken: Given) -> Affine:
    """Return a message as maps; where the transition did not travel, the state stands in its place and is not read."""
    state, *transition = message
    if not transition:
        return Affine(state, state)
    missing = len(taken) - _transitions(taken)
    return Affine(torch.cat([transition[0][:, :missing], transition[0]], dim=1), state)


def _fold(maps: Mapping[int, tuple[Affine, int]], places: Sequence[int]) -> Tensor:
    """Return the states that enter the links at `places`, `[B, P, H, K, V]`."""
    part, index = maps[0]
    state = torch.zeros_like(part.state[:, index])
    entering = {0: state}
    for place in range(max(places)):
        part, index = maps[place]
        made = part.state[:, index]
        state = made if place == 0 else apply(part.transition[:, index], state) + made
        entering[place + 1] = state
    return torch.stack([entering[place] for place in places], dim=1)
