"""How K/V reach the queries that selected them: which of them move, and along which way. All ranks decide alike.

| moves   | what travels                                                                                      |
|---------|---------------------------------------------------------------------------------------------------|
| `all`   | what the causal mask shows, on the schedule, as for dense attention; only arithmetic is skipped    |
| `hops`  | the same schedule without hops and tokens that nobody selected: spans from first to last           |
| `blocks`| the selected blocks and no others, straight from their owners                                     |
| `auto`  | `blocks` where that sends clearly less than `hops`                                                 |
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, Protocol

import torch
from torch import Tensor

from longctx.kernels.block_sparse.selection import Selection
from longctx.parallel.demand import Demand
from longctx.parallel.needs import Needs
from longctx.parallel.schedule import Attend, AttendBackward, Schedule, Shape
from longctx.parallel.schedules import block_exchange
from longctx.parallel.transport import Transport

MovesName = Literal["auto", "all", "hops", "blocks"]
MOVES: tuple[MovesName, ...] = ("auto", "all", "hops", "blocks")
SELECTIVE: tuple[MovesName, ...] = ("hops", "blocks")  # only what is selected moves: without effect where nothing is
# An exchange of blocks goes across the whole group, hops to neighbours: it must save this much to be chosen.
GAIN = 0.8


class Moves(Protocol):
    """One layer's way of bringing K/V, forward and backward."""

    def tokens(self, source: int) -> slice | Tensor:
        """Return which tokens of a source's shard come here, as local indices."""
        ...

    def forward(self, ring: Transport, k: Tensor, v: Tensor, *, attend: Attend) -> None: ...

    def backward(self, ring: Transport, k: Tensor, v: Tensor, *, attend: AttendBackward) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True, eq=False)
class OnSchedule:
    """Spans of shards on a schedule."""

    schedule: Schedule
    needs: Needs
    team: int

    def tokens(self, source: int) -> slice | Tensor:
        span = self.needs.keys[self.team][source]
        assert span is not None, (self.team, source)
        return slice(*span)

    def forward(self, ring: Transport, k: Tensor, v: Tensor, *, attend: Attend) -> None:
        self.schedule.forward(ring, self.needs, k, v, attend=attend)

    def backward(self, ring: Transport, k: Tensor, v: Tensor, *, attend: AttendBackward) -> tuple[Tensor, Tensor]:
        return self.schedule.backward(ring, self.needs, k, v, attend=attend)


@dataclass(frozen=True, eq=False)
class OfBlocks:
    """Selected blocks from their owners."""

    demand: Demand
    team: int

    def tokens(self, source: int) -> slice | Tensor:
        return self.demand.tokens(self.team, source)

    def forward(self, ring: Transport, k: Tensor, v: Tensor, *, attend: Attend) -> None:
        block_exchange.forward(ring, self.demand, k, v, attend=attend)

    def backward(self, ring: Transport, k: Tensor, v: Tensor, *, attend: AttendBackward) -> tuple[Tensor, Tensor]:
        return block_exchange.backward(ring, self.demand, k, v, attend=attend)


class Here:
    """Everything is at hand: nothing moves."""

    def tokens(self, source: int) -> slice | Tensor:
        return slice(None)

    def forward(self, ring: Transport, k: Tensor, v: Tensor, *, attend: Attend) -> None:
        attend(0, (0, k.shape[2]), k, v)

    def backward(self, ring: Transport, k: Tensor, v: Tensor, *, attend: AttendBackward) -> tuple[Tensor, Tensor]:
        return attend(0, (0, k.shape[2]), k, v)


@dataclass(frozen=True, kw_only=True)
class MoveCosts:
    """Bytes of K/V and their gradients that all teams send, forward and backward, per row and member of a team."""

    all: int
    hops: int
    blocks: int

    def choose(self, name: MovesName) -> MovesName:
        """Return a name for `auto`."""
        if name != "auto":
            return name
        return "blocks" if self.blocks < GAIN * self.hops else "hops"

    def of(self, name: MovesName) -> int:
        """Return the bytes of a way."""
        return {"all": self.all, "hops": self.hops, "blocks": self.blocks}[name]


def move_costs(schedule: Schedule, *, static: Needs, demand: Demand, shape: Shape) -> MoveCosts:
    """Count what each way sends, summed over the teams; `shape` has the heads of one rank."""
    return MoveCosts(
        all=_on_schedule(schedule, static, shape),
        hops=schedule.kv_bytes(demand.needs, shape),
        blocks=demand.sent_by_all(shape),
    )


@lru_cache(maxsize=32)  # what a mask shows is the same for all layers
def _on_schedule(schedule: Schedule, static: Needs, shape: Shape) -> int:
    return schedule.kv_bytes(static, shape)


def make_moves(name: MovesName, schedule: Schedule, *, static: Needs, demand: Demand, team: int) -> Moves:
    """Return the way with this name, which is not `auto`."""
    if name == "blocks":
        return OfBlocks(demand, team)
    return OnSchedule(schedule, static if name == "all" else demand.needs, team)


def wanted_blocks(selection: Selection, *, block_size: int, total: int) -> Tensor:
    """Return which blocks of the sequence hold a key that some query of a selection sees: bool `[ceil(total / size)]`.

    Of keys with classes those that a slot of their own class reaches, to the block.
    """
    wanted = [_wanted(part, block_size, total) for part in selection.parts()]
    return torch.stack(wanted).any(0)


def _wanted(selection: Selection, block_size: int, total: int) -> Tensor:
    told = (selection.lo, selection.hi, selection.slot_class, selection.key_class)
    if all(x.stride(2) == 0 for x in told if x is not None):  # alike in all heads: one is enough
        selection = selection.of_heads(0, 1)
    count = -(-total // block_size)
    seen = selection.hi >= selection.lo
    first = (selection.lo.clamp(0, total - 1) // block_size)[seen]
    last = (selection.hi.clamp(0, total - 1) // block_size)[seen]
    if selection.slot_class is None or selection.key_class is None:
        return _covered(first, last, count) > 0
    # Every class of every head and row is a sequence of blocks of its own, whose codes follow each other.
    classes = int(selection.key_class.max()) + 1
    lane = torch.arange(selection.rows * selection.heads, device=seen.device).view(-1, 1, selection.heads, 1)
    strand = (lane * classes + selection.slot_class).masked_fill(selection.slot_class >= classes, -1)
    strand = strand.expand_as(seen)[seen]
    begin, end = (torch.sort((strand * count + each)[strand >= 0]).values for each in (first, last))
    keys = selection.key_class.to(torch.int64)
    block = torch.arange(total, device=keys.device) // block_size
    code = (lane[..., 0] * classes + keys) * count + block[None, :, None]
    within = torch.searchsorted(begin, code, right=True) - torch.searchsorted(end, code)  # intervals that hold it
    hit = (within > 0) & (keys >= 0)
    wanted = torch.zeros(count, dtype=torch.bool, device=keys.device)
    wanted[block[hit.any(-1).any(0)]] = True
    return wanted


def _covered(first: Tensor, last: Tensor, count: int) -> Tensor:
    """Count how many intervals, both ends inclusive, hold each of `count` places."""
    edges = torch.zeros(count + 1, dtype=torch.int64, device=first.device)
    edges += torch.bincount(first, minlength=count + 1)
    edges -= torch.bincount(last + 1, minlength=count + 1)
    return edges.cumsum(0)[:count]


def distances(selection: Selection, positions: Tensor, *, block_size: int, buckets: int) -> Sequence[int]:
    """Count the slots that are not empty by how many blocks they end before their query: 0, 1, 2-3, 4-7, ...

    Args:
        positions: int64 `[T]`, of the queries.
        buckets: how many counts; the last one has all that is farther.
    """
    counts = torch.zeros(buckets, dtype=torch.int64, device=positions.device)
    for part in selection.parts():
        seen = part.hi >= part.lo
        blocks = positions[None, :, None, None] // block_size - part.hi // block_size
        level = torch.frexp((blocks[seen]).clamp(min=0).to(torch.float64)).exponent.clamp(max=buckets - 1)
        counts += torch.bincount(level.to(torch.int64), minlength=buckets)
    return counts.tolist()
