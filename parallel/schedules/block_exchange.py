"""Exchange of selected blocks: every rank gets exactly what its queries selected, straight from the owners.

A step for each distance d between ranks: rank r gives to rank r + d and takes from rank r - d. A rank holds two parts
of others at most: the one that it attends to, and the next one, which arrives meanwhile. Backward, the gradients of a
part go home while the next one is attended to. A ring sends everything between the first and the last needed token
past everybody, but only to neighbours; which sends less is known from the demand (`demand.py`).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from longctx.kernels.merge import accumulator_dtype
from longctx.parallel.demand import Demand
from longctx.parallel.schedule import Attend, AttendBackward
from longctx.parallel.transport import Exchange, Transport

Part = tuple[Tensor, Tensor]  # k and v of some tokens, or their gradients


def forward(ring: Transport, demand: Demand, k: Tensor, v: Tensor, *, attend: Attend) -> None:
    """Call `attend(source, all KV heads, k, v)` with the needed tokens of every shard, the own one first.

    Args:
        k, v: `[B, T, HK, D]`, this rank's.
    """
    for step in _steps(ring, demand, k, v):
        if step.part is not None:
            attend(step.source, (0, k.shape[2]), *step.part)


def backward(ring: Transport, demand: Demand, k: Tensor, v: Tensor, *, attend: AttendBackward) -> tuple[Tensor, Tensor]:
    """Call `attend(source, all KV heads, k, v) -> (dk, dv)` likewise; return the own shard's, summed by distance."""
    wide = accumulator_dtype(k.dtype)
    dk, dv = torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)

    def add(tokens: Tensor, part: Part | None, exchange: Exchange | None) -> None:
        if exchange is not None:
            exchange.wait()
        if part is not None:
            dk[:, tokens] += part[0]
            dv[:, tokens] += part[1]

    home: tuple[Tensor, Part | None, Exchange | None] | None = None
    for step in _steps(ring, demand, k, v):
        gradients = None if step.part is None else attend(step.source, (0, k.shape[2]), *step.part)
        if home is not None:
            add(*home)
        if step.source == ring.rank:
            home = step.given, gradients, None
        else:
            coming = _empty(k, v, len(step.given), dtype=wide)
            home = step.given, coming, _post(ring, gradients, step.source, coming, step.peer)
    if home is not None:
        add(*home)
    return dk, dv


@dataclass(frozen=True)
class _Step:
    """What is at hand, and who got what.

    Attributes:
        source: whose tokens `part` is; None where none of them is needed.
        peer: who was given the own tokens `given`, int64 local indices.
    """

    source: int
    peer: int
    given: Tensor
    part: Part | None


def _steps(ring: Transport, demand: Demand, k: Tensor, v: Tensor) -> Iterator[_Step]:
    """Yield the own part, then those of the ranks before, while the next one is on its way."""

    def post(distance: int) -> tuple[_Step, Exchange | None]:
        source, peer = (ring.rank - distance) % ring.size, (ring.rank + distance) % ring.size
        given = demand.tokens(peer, ring.rank).to(k.device)
        going = (k[:, given], v[:, given]) if len(given) else None
        if distance == 0:
            return _Step(source, peer, given, going), None
        coming = _empty(k, v, int(demand.counts[ring.rank, source]), dtype=k.dtype)
        return _Step(source, peer, given, coming), _post(ring, going, peer, coming, source)

    following = post(0)
    for distance in range(ring.size):
        step, exchange = following
        if exchange is not None:
            exchange.wait()
        if distance + 1 < ring.size:
            following = post(distance + 1)
        yield step


def _post(ring: Transport, going: Part | None, peer: int, coming: Part | None, source: int) -> Exchange | None:
    outgoing = {} if going is None else {peer: going}
    incoming = {} if coming is None else {source: coming}
    return ring.exchange(outgoing, incoming) if outgoing or incoming else None


def _empty(k: Tensor, v: Tensor, tokens: int, *, dtype: torch.dtype) -> Part | None:
    if not tokens:
        return None
    like_k, like_v = (x.new_empty((x.shape[0], tokens, *x.shape[2:]), dtype=dtype) for x in (k, v))
    return like_k, like_v
