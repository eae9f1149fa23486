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
    for source, _, part in _parts(ring, demand, k, v):
        if part is not None:
            attend(source, (0, k.shape[2]), *part)


def backward(ring: Transport, demand: Demand, k: Tensor, v: Tensor, *, attend: AttendBackward) -> tuple[Tensor, Tensor]:
    """Call `attend(source, all KV heads, k, v) -> (dk, dv)` likewise; return the own shard's, summed by distance."""
    wide = accumulator_dtype(k.dtype)
    dk, dv = torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)

    def add(peer: int, part: Part | None) -> None:
        if part is not None:
            tokens = demand.tokens(peer, ring.rank).to(k.device)
            dk[:, tokens] += part[0]
            dv[:, tokens] += part[1]

    home: _Step | None = None
    for source, peer, part in _parts(ring, demand, k, v):
        gradients = None if part is None else attend(source, (0, k.shape[2]), *part)
        if source == ring.rank:
            add(source, gradients)
            continue
        if home is not None:
            add(home.source, home.wait())
        coming = _empty(k, v, int(demand.counts[peer, ring.rank]), dtype=wide)
        home = _post(ring, gradients, source, coming, peer)
    if home is not None:
        add(home.source, home.wait())
    return dk, dv


def _parts(ring: Transport, demand: Demand, k: Tensor, v: Tensor) -> Iterator[tuple[int, int, Part | None]]:
    """Yield, step by step, the rank that gives, the one that is given to, and what arrived; the own part first."""

    def post(distance: int) -> _Step:
        source, peer = (ring.rank - distance) % ring.size, (ring.rank + distance) % ring.size
        coming = _empty(k, v, int(demand.counts[ring.rank, source]), dtype=k.dtype)
        return _post(ring, _of_own(demand, peer, ring.rank, k, v), peer, coming, source)

    step = post(1) if ring.size > 1 else None
    yield ring.rank, ring.rank, _of_own(demand, ring.rank, ring.rank, k, v)
    for distance in range(1, ring.size):
        assert step is not None
        arrived, source, peer = step.wait(), step.source, step.peer
        if distance + 1 < ring.size:
            step = post(distance + 1)
        yield source, peer, arrived


@dataclass(frozen=True)
class _Step:
    """A part on its way to `peer`, and another, or None, on its way here from `source`."""

    peer: int
    source: int
    coming: Part | None
    exchange: Exchange | None

    def wait(self) -> Part | None:
        if self.exchange is not None:
            self.exchange.wait()
        return self.coming


def _post(ring: Transport, going: Part | None, peer: int, coming: Part | None, source: int) -> _Step:
    outgoing = {} if going is None else {peer: going}
    incoming = {} if coming is None else {source: coming}
    return _Step(peer, source, coming, ring.exchange(outgoing, incoming) if outgoing or incoming else None)


def _of_own(demand: Demand, peer: int, rank: int, k: Tensor, v: Tensor) -> Part | None:
    """Return what `peer` needs of the own shard."""
    tokens = demand.tokens(peer, rank).to(k.device)
    return (k[:, tokens], v[:, tokens]) if len(tokens) else None


def _empty(k: Tensor, v: Tensor, tokens: int, *, dtype: torch.dtype) -> Part | None:
    if not tokens:
        return None
    shapes = ((each.shape[0], tokens, *each.shape[2:]) for each in (k, v))
    dk, dv = (k.new_empty(shape, dtype=dtype) for shape in shapes)
    return dk, dv
