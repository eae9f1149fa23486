"""What a sparse layer should send, to the byte: from what was selected, and from the shapes that its place was given.

Which blocks each team needs is read off the selections of all ranks, slot by slot; ranks agree on it by other means.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from longctx.kernels.block_sparse.selection import Selection
from longctx.kernels.mask import causal, documents, sliding_window
from longctx.kernels.merge import accumulator_dtype
from longctx.mixers.sparse.base import Slots
from longctx.parallel.chain import chain
from longctx.parallel.cost import traffic
from longctx.parallel.demand import Demand, Shards, agreed_bytes, shards_of
from longctx.parallel.heads import HeadSplit
from longctx.parallel.plan import plan
from longctx.parallel.schedule import Schedule, Sent, Shape
from longctx.parallel.schedules.ring import Ring
from longctx.parallel.teams import Teams
from longctx.sparse_attention import BUCKETS
from longctx.sparse_moves import MoveCosts, move_costs
from longctx.sparse_traffic import selection_bytes
from longctx.verification.small import Small
from longctx.verification.sparse_layer import document_starts
from longctx.verification.watch_sparse import Note

NOTHING = Sent(0, {})


@dataclass(frozen=True)
class Pass:
    """What one rank sends: forward, backward."""

    forward: Sent
    backward: Sent

    def __add__(self, other: "Pass") -> "Pass":
        return Pass(_plus(self.forward, other.forward), _plus(self.backward, other.backward))


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of `attend` or `attend_sum` on all ranks.

    Attributes:
        notes: of each rank.
        first: whether the ranks have not agreed on this selection before.
    """

    small: Small
    notes: Sequence[Note]
    first: bool

    @property
    def teams(self) -> Teams:
        """Return which ranks share heads."""
        return self.small.schedule.teams(self.small.cp)

    @cached_property
    def shape(self) -> Shape:
        """Return the shape of the heads that one rank computes."""
        (shape, dtype), (v_shape, _) = self.notes[0].sizes["q"], self.notes[0].sizes["v"]
        split = HeadSplit(shape[2], v_shape[2], self.teams.size)
        return Shape(
            heads=len(split.q(0)),
            kv_heads=len(split.kv(0)),
            head_dim=shape[3],
            v_head_dim=v_shape[3],
            dtype=dtype,
        )

    def needed(self, member: int) -> Demand:
        """Return which blocks each team needs for a member's heads."""
        (shape, _), (v_shape, _) = self.notes[0].sizes["q"], self.notes[0].sizes["v"]
        split = HeadSplit(shape[2], v_shape[2], self.teams.size)
        wanted = []
        for members in self.teams.members:
            of_team = [self._touched(self.notes[rank], split, member) for rank in members]
            wanted.append(torch.stack(of_team).any(0))
        return Demand(self._shards, torch.stack(wanted))

    def shown(self) -> Demand:
        """Return which blocks documents and causality show to each team."""
        size, wanted = self._shards.block_size, []
        block = torch.arange(self._shards.count)
        starts = torch.stack([document_starts(self.small, row) for row in self.small.documents])
        for places in self._shards.positions:
            first, last = starts[:, places, None] // size, places[:, None] // size
            wanted.append(((block >= first) & (block <= last)).any(0).any(0))
        return Demand(self._shards, torch.stack(wanted))

    def costs(self, member: int) -> MoveCosts:
        """Return the bytes of each way to move K/V, per row of the batch."""
        return move_costs(self.small.schedule, static=self.shown().needs, demand=self.needed(member), shape=self.shape)

    def way(self, member: int) -> str:
        """Return how K/V move for a member's heads."""
        return "all" if self.teams.count == 1 else self.costs(member).choose(self.small.attention.moves)

    def moved(self, rank: int) -> Pass:
        """Return what a rank sends of K/V and their gradients."""
        team, member = self.teams.place(rank)
        way, demand = self.way(member), self.needed(member)
        if way == "blocks":
            both = demand.sent(team, self.shape)
        else:
            needs = (self.shown() if way == "all" else demand).needs
            both = keys_travel(self.small.schedule).sent(team, needs, self.shape)
        rows = self.notes[rank].sizes["q"][0][0]
        peers = {index: members[member] for index, members in enumerate(self.teams.members)}
        return Pass(*(Sent(sent.hops, {peers[p]: rows * n for p, n in sent.bytes_to.items()}) for sent in both))

    def agreed(self, rank: int) -> Pass:
        """Return what a rank sends to agree on what is needed."""
        if self.teams.count == 1 or not self.first:
            return Pass(NOTHING, NOTHING)
        peers = [peer for peer in self.teams.counterparts(rank) if peer != rank]
        size = agreed_bytes(self._shards.count, BUCKETS)
        return Pass(Sent(1, dict.fromkeys(peers, size)), NOTHING)

    def shared(self, rank: int) -> Pass:
        """Return what a rank sends to those that share its heads: selections, q, k, v and gates, and back out."""
        teams, note, own = self.teams, self.notes[rank], self.shape
        if teams.size == 1:
            return Pass(NOTHING, NOTHING)
        (rows, tokens, heads, _), dtype = note.sizes["q"]
        split = HeadSplit(heads, note.sizes["v"][0][2], teams.size)
        low, wide = dtype.itemsize, accumulator_dtype(dtype).itemsize
        assert note.selection is not None
        parts = note.selection.parts()
        told = sum(
            part.rows * selection_bytes([slots_of(part)], tokens=tokens, total=self.small.total, split=split)
            for part in parts
        )
        q, out = own.heads * own.head_dim, own.heads * own.v_head_dim
        kv = own.kv_heads * (own.head_dim + own.v_head_dim)
        there = (q + kv + out) * low
        back = out * low + own.heads * wide + q * low + kv * (wide if split.repeats_kv else low)
        hops, gates = 2, note.sizes.get("gates")
        if gates is not None:
            of_slots = own.heads * gates[0][3] * gates[1].itemsize
            there, back, hops = there + of_slots, back + of_slots, 3
        peers = [peer for peer in teams.members[teams.place(rank)[0]] if peer != rank]
        forward = Sent(len(parts) + hops, dict.fromkeys(peers, told + rows * tokens * there))
        return Pass(forward, Sent(hops, dict.fromkeys(peers, rows * tokens * back)))

    @cached_property
    def _shards(self) -> Shards:
        selection = self.notes[0].selection
        assert selection is not None
        return shards_of(self.small.layout, self.teams, total=self.small.total, block_size=selection.block_size)

    def _touched(self, note: Note, split: HeadSplit, member: int) -> Tensor:
        """Return the blocks that a rank's queries touch with a member's heads: bool `[blocks]`."""
        assert note.selection is not None
        found = []
        for part in note.selection.parts():
            heads = split.kv(member) if part.heads == split.kv_heads else split.q(member)
            found.append(touched(part, total=self.small.total)[sorted(set(heads))].any(0))
        return torch.stack(found).any(0)


def slots_of(part: Selection) -> Slots:
    """Return the size of a selection without others beside it."""
    return Slots(part.heads, part.slots, part.slot_class is not None)


def touched(part: Selection, *, total: int) -> Tensor:
    """Return for each head which blocks a selection without others beside it touches, bool `[HS, blocks]`: those where
    a slot reaches, if they hold a key of its class at all."""
    size = part.block_size
    block = torch.arange(-(-total // size))
    first, last = (x[..., None] // size for x in (part.lo, part.hi))
    seen = (block >= first) & (block <= last) & (part.hi >= part.lo)[..., None]  # [R, T, HS, S, blocks]
    if part.slot_class is not None and part.key_class is not None:
        holds = torch.zeros(*seen.shape[:4], len(block), dtype=torch.bool)
        for place in range(total):
            same = part.key_class[:, place][:, None, :, None] == part.slot_class
            holds[..., place // size] |= same
        seen = seen & holds
    return seen.any(3).any(1).any(0)


def keys_travel(schedule: Schedule) -> Schedule:
    """Return a schedule whose K/V travel in the backward pass too, as what is selected does."""
    return replace(schedule, backward_moves="rotate_kv") if isinstance(schedule, Ring) else schedule


def planned(small: Small, notes: Sequence[Sequence[Note]]) -> list[Pass]:
    """Return what each rank sends for one layer that trains, given the notes of all ranks' places."""
    attending = iter(attended(small, notes))
    steps: list[list[Pass]] = []
    for step in zip(*notes, strict=True):
        if step[0].selection is None:
            steps.append(_sent(small, step))
        else:
            call = next(attending)
            steps.append([call.shared(rank) + call.agreed(rank) + call.moved(rank) for rank in range(small.cp)])
    return [sum((each[rank] for each in steps), start=Pass(NOTHING, NOTHING)) for rank in range(small.cp)]


def attended(small: Small, notes: Sequence[Sequence[Note]]) -> list[Call]:
    """Return the calls that attend to a selection."""
    calls: list[Call] = []
    for step in zip(*notes, strict=True):
        if step[0].selection is not None:
            first = all(step[0].selection is not call.notes[0].selection for call in calls)
            calls.append(Call(small=small, notes=step, first=first))
    return calls


def _sent(small: Small, notes: Sequence[Note]) -> list[Pass]:
    """Return what each rank sends for one call that attends to no selection."""
    method, ranks = notes[0].method, range(small.cp)
    if method.startswith("gather_"):
        return [_gathered(notes, rank) for rank in ranks]
    if method in ("attend_window", "attend_dense"):
        return [_masked(small, notes[rank], rank) for rank in ranks]
    if method == "recur":
        return [_recurred(small, notes[rank], rank) for rank in ranks]
    assert method == "attend_local", method
    return [Pass(NOTHING, NOTHING)] * small.cp


def _gathered(notes: Sequence[Note], rank: int) -> Pass:
    """Every rank gets everything: its own to all others, and their gradients back to each."""
    sizes = [torch.Size(note.sizes["x"][0]).numel() * note.sizes["x"][1].itemsize for note in notes]
    others = [peer for peer in range(len(notes)) if peer != rank]
    forward = Sent(int(bool(others)), dict.fromkeys(others, sizes[rank]))
    if not notes[rank].differentiable:
        return Pass(forward, NOTHING)
    return Pass(forward, Sent(forward.hops, {peer: sizes[peer] for peer in others}))


def _masked(small: Small, note: Note, rank: int) -> Pass:
    """Attention under a mask: the plan's."""
    bounds = [each.cu_seqlens if small.attention.documents else (0, small.total) for each in small.samples]
    masks = [causal() & documents(row) for row in bounds]
    if note.window:
        masks = [mask & sliding_window(note.window - 1, None) for mask in masks]
    made = plan(small.layout, tuple(masks), small.schedule, rank=rank, total=small.total)
    (rows, _, heads, head_dim), dtype = note.sizes["q"]
    kv_heads, v_head_dim = note.sizes["v"][0][2:]
    shape = Shape(heads=heads, kv_heads=kv_heads, head_dim=head_dim, v_head_dim=v_head_dim, dtype=dtype)
    return Pass(*traffic(made, shape, batch=rows))


def _recurred(small: Small, note: Note, rank: int) -> Pass:
    """A recurrence without gates: states, and for each segment whether a document begins there."""
    links = chain(small.layout, small.total)
    if len(links) == 1:
        return Pass(NOTHING, NOTHING)
    (rows, _, heads, keys), dtype = note.sizes["q"]
    wide = accumulator_dtype(dtype).itemsize * rows * heads
    sizes = {"transition_bytes": wide, "state_bytes": wide * keys * note.sizes["v"][0][3]}
    return Pass(*(small.passing.sent(way, rank, **sizes) for way in (links, links.reversed())))


def _plus(a: Sent, b: Sent) -> Sent:
    peers = sorted({*a.bytes_to, *b.bytes_to})
    return Sent(a.hops + b.hops, {peer: a.bytes_to.get(peer, 0) + b.bytes_to.get(peer, 0) for peer in peers})
