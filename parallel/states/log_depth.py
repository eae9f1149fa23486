"""A scan over the links in as many hops as the logarithm of their number (Hillis & Steele, CACM 29(12), 1986).

Every link knows the map of some links right before its own, twice as many after each hop: at distances 1, 2, 4, ... it
gets from the link so far back what that knows, with its own map. A map that reaches back to the first link is applied
to nothing but zeros: of such a one the state travels alone.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from longctx.kernels.linear.affine import Affine
from longctx.parallel.chain import Chain
from longctx.parallel.schedule import Sent
from longctx.parallel.transport import Transport

Links = list[tuple[int, int]]  # (place of the sender's link, local index of this rank's segment)


@dataclass(frozen=True)
class LogDepth:
    """Double what is known at every hop."""

    name: str = "log_depth"

    def incoming(self, summary: Affine, *, chain: Chain, transport: Transport) -> Tensor:
        """Return the state that enters each segment of this rank, `[B, P, H, K, V]`."""
        rank = transport.rank
        known = Affine(_identity(summary.transition), torch.zeros_like(summary.state))
        for distance in _distances(chain):
            leaving, coming = _messages(chain, rank, distance)
            told = summary.after(known)
            # What a link gets that has none so far back: nothing, and the transition 0, which nobody asks for again.
            heard = Affine(torch.zeros_like(summary.transition), torch.zeros_like(summary.state))
            outgoing = {peer: _message(told, links, distance) for peer, links in leaving.items() if peer != rank}
            incoming = {peer: _buffers(told, links, distance) for peer, links in coming.items() if peer != rank}
            exchange = transport.exchange(outgoing, incoming) if outgoing or incoming else None
            if rank in coming:
                incoming[rank] = _message(told, leaving[rank], distance)
            if exchange is not None:
                exchange.wait()
            for peer, links in coming.items():
                state, *transition = incoming[peer]
                heard.state[:, [segment for _, segment in links]] = state
                if transition:
                    heard.transition[:, _with_transition(links, distance)] = transition[0]
            known = known.after(heard)
        return known.state

    def sent(self, chain: Chain, rank: int, *, transition_bytes: int, state_bytes: int) -> Sent:
        """Count for every distance the links of this rank that another rank has a link so far after."""
        hops, bytes_to = 0, dict[int, int]()
        for distance in _distances(chain):
            leaving, coming = _messages(chain, rank, distance)
            hops += bool({*leaving, *coming} - {rank})
            for peer, links in leaving.items():
                if peer != rank:
                    count = len(_with_transition(links, distance)) * transition_bytes + len(links) * state_bytes
                    bytes_to[peer] = bytes_to.get(peer, 0) + count
        return Sent(hops, dict(sorted(bytes_to.items())))


def _distances(chain: Chain) -> Iterator[int]:
    distance = 1
    while distance < len(chain):
        yield distance
        distance *= 2


def _messages(chain: Chain, rank: int, distance: int) -> tuple[dict[int, Links], dict[int, Links]]:
    """Return by peer the links whose maps leave this rank and those that come to it, in the order of the chain."""
    leaving: dict[int, Links] = defaultdict(list)
    coming: dict[int, Links] = defaultdict(list)
    for place, segment in chain.walk(rank):
        if place + distance < len(chain):
            leaving[chain.owner(place + distance)].append((place, segment))
        if place >= distance:
            coming[chain.owner(place - distance)].append((place - distance, segment))
    return leaving, coming


def _with_transition(links: Links, distance: int) -> list[int]:
    """Return the segments of links whose known map does not reach back to the first link."""
    return [segment for place, segment in links if place >= distance]


def _message(told: Affine, links: Links, distance: int) -> list[Tensor]:
    counted = [segment for _, segment in links], _with_transition(links, distance)
    return [x[:, segments] for x, segments in zip((told.state, told.transition), counted, strict=True) if segments]


def _buffers(like: Affine, links: Links, distance: int) -> list[Tensor]:
    counts = len(links), len(_with_transition(links, distance))
    tensors = zip((like.state, like.transition), counts, strict=True)
    return [x.new_empty((x.shape[0], count, *x.shape[2:])) for x, count in tensors if count]


def _identity(like: Tensor) -> Tensor:
    if like.shape[-1] == 1:
        return torch.ones_like(like)
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device).expand_as(like)
