"""A circuit: in which order shards go round the ranks, and which messages that takes. Integers only.

All ranks advance in lockstep; at time t each computes with the shard of one source. A ring of `size` ranks is split
into rings of `inner` neighbours (one machine, say), themselves on an outer ring: the double ring of LoongTrain (arXiv
2406.18485) and BurstEngine. With `inner == size` that is the plain ring of Ring Attention (arXiv 2310.01889). A shard
goes round an inner ring while its copy is under way to the next one: it crosses between two machines once.

Sums (dK and dV, or dQ) follow the path of their shard from rank to rank, each adding its own, and go straight home from
the last one before a rank that adds nothing. The owner's own share waits there: one hop less than the 2 cp - 1 of Ring
Attention.

Ranks that do not need a shard are passed over, and tokens that no later stop needs are not sent on.
"""

from dataclasses import dataclass
from functools import lru_cache

from longctx.parallel.needs import Span, Table, joined_span

NEAR, FAR = 0, 1  # lanes: inside an inner ring, and between them


@dataclass(frozen=True)
class Message:
    """Tokens `span` of `source`'s shard or sums, to or from `peer`; a received shard is `due` at that time."""

    peer: int
    source: int
    span: Span
    due: int


Messages = tuple[Message, ...]


@dataclass(frozen=True)
class Step:
    """What one rank does at one time.

    Attributes:
        source: whose shard is at hand.
        needed: the tokens of it that this rank computes with; None = nothing.
        sent, received: shard messages posted before computing, by lane.
        released: shards that are needed no more after this step.
        sums_sent: the sums after this rank has added its own: on to the next rank if that adds to them, or else home.
        sums_received: sums that are posted after computing: of shards that this rank will add to, and of its own.
    """

    source: int
    needed: Span | None
    sent: tuple[Messages, Messages]
    received: tuple[Messages, Messages]
    released: tuple[int, ...]
    sums_sent: Message | None
    sums_received: Messages


@dataclass(frozen=True)
class _Circuit:
    """The path of every shard: which rank holds which one at a time."""

    size: int
    inner: int

    def stop(self, source: int, time: int) -> int:
        """Return which rank source's shard is for at a time."""
        outer, own = divmod(source, self.inner)
        a, b = divmod(time, self.inner)
        return (outer + a) % (self.size // self.inner) * self.inner + (own + b) % self.inner

    def source(self, rank: int, time: int) -> int:
        """Return whose shard is for a rank at a time: the inverse of `stop`."""
        outer, own = divmod(rank, self.inner)
        a, b = divmod(time, self.inner)
        return (outer - a) % (self.size // self.inner) * self.inner + (own - b) % self.inner


@dataclass(frozen=True)
class _Hand:
    """Tokens `span` are handed from the stop at time `giver` to that at time `taker`, posted at time `posted`."""

    giver: int
    taker: int
    posted: int
    lane: int
    span: Span


def order(rank: int, size: int, inner: int) -> tuple[int, ...]:
    """Return whose shard is for a rank at each time; its own comes first."""
    return tuple(_Circuit(size, inner).source(rank, time) for time in range(size))


@lru_cache(maxsize=256)
def steps(rank: int, wanted: Table, inner: int) -> tuple[Step, ...]:
    """Return what a rank does at each time.

    Args:
        wanted: `wanted[rank][source]`: the tokens of a source's shard that a rank computes with.
        inner: ranks of an inner ring; divides the number of ranks.
    """
    size = len(wanted)
    circuit = _Circuit(size, inner)
    sent: list[tuple[list[Message], list[Message]]] = [([], []) for _ in range(size)]
    received: list[tuple[list[Message], list[Message]]] = [([], []) for _ in range(size)]
    released: list[list[int]] = [[] for _ in range(size)]
    sums_sent: list[Message | None] = [None] * size
    sums_received: list[list[Message]] = [[] for _ in range(size)]
    for source, path in enumerate(_paths(wanted, inner)):
        mine = path.stops.index(rank)
        last_use = mine
        for hand in path.hands:
            if hand.giver == mine:
                sent[hand.posted][hand.lane].append(Message(path.stops[hand.taker], source, hand.span, hand.taker))
                last_use = max(last_use, hand.posted)
            if hand.taker == mine:
                received[hand.posted][hand.lane].append(Message(path.stops[hand.giver], source, hand.span, hand.taker))
        released[last_use].append(source)
        for hand in path.sums:
            if hand.giver == mine:
                sums_sent[mine] = Message(path.stops[hand.taker], source, hand.span, hand.taker)
            if hand.taker == mine:
                sums_received[hand.posted].append(Message(path.stops[hand.giver], source, hand.span, hand.taker))

    def by_due(lanes: tuple[list[Message], list[Message]]) -> tuple[Messages, Messages]:
        near, far = (tuple(sorted(lane, key=lambda message: (message.due, message.source))) for lane in lanes)
        return near, far

    return tuple(
        Step(
            source=circuit.source(rank, time),
            needed=wanted[rank][circuit.source(rank, time)],
            sent=by_due(sent[time]),
            received=by_due(received[time]),
            released=tuple(released[time]),
            sums_sent=sums_sent[time],
            sums_received=tuple(sums_received[time]),
        )
        for time in range(size)
    )


@dataclass(frozen=True)
class _Path:
    """One shard's way: the rank of each stop, who hands the shard to whom, and who the sums (to time 0: home)."""

    stops: tuple[int, ...]
    hands: tuple[_Hand, ...]
    sums: tuple[_Hand, ...]


@lru_cache(maxsize=32)  # the same for all ranks
def _paths(wanted: Table, inner: int) -> tuple[_Path, ...]:
    size = len(wanted)
    circuit = _Circuit(size, inner)
    paths = []
    for source in range(size):
        stops = tuple(circuit.stop(source, time) for time in range(size))
        wants = [wanted[stop][source] for stop in stops]
        paths.append(_Path(stops, tuple(_hands(wants, inner)), tuple(_sums(wants))))
    return tuple(paths)


def _sums(wants: list[Span | None]) -> list[_Hand]:
    """Return how the sums go: along stops that follow each other and add something, and home from the last of those."""
    hands: list[_Hand] = []
    total: Span | None = None
    for time in range(1, len(wants)):
        total = None if wants[time] is None else joined_span(total, wants[time])
        if total is not None:
            goes_on = time + 1 < len(wants) and wants[time + 1] is not None
            hands.append(_Hand(time, time + 1 if goes_on else 0, time, NEAR, total))
    return hands


def _hands(wants: list[Span | None], inner: int) -> list[_Hand]:
    """Return by whom, and when, each stop of a shard's path that wants it gets it: nobody else carries it.

    By the stop before; after a gap by the first of the same inner ring, the owner on the first ring; and the first of
    a ring by that of the ring before.
    """
    hands: list[tuple[int, int, int, int]] = []
    entry = 0
    for first in range(0, len(wants), inner):
        entered = first == 0
        for time in range(max(first, 1), first + inner):
            if wants[time] is None:
                continue
            if entered:
                before = time - 1 if time - 1 >= entry and (wants[time - 1] is not None or time == 1) else entry
                hands.append((before, time, time - 1, NEAR))
            else:
                # As early as the giver has it, but no more than one inner ring ahead: it takes memory there.
                hands.append((entry, time, max(entry, time - inner), FAR))
                entry, entered = time, True
    carried = list(wants)  # what a stop, or one that has the shard from it, wants
    for giver, taker, _, _ in reversed(hands):
        if giver:
            carried[giver] = joined_span(carried[giver], carried[taker])
    return [_Hand(*hand, span) for hand in hands if (span := carried[hand[1]]) is not None]


def mirrored(wanted: Table) -> Table:
    """Return the table for ranks counted from the other end: shards then go round the other way."""
    return tuple(tuple(reversed(row)) for row in reversed(wanted))


def sent(rank: int, wanted: Table, inner: int, *, payload: int, sums: int) -> tuple[int, dict[int, int]]:
    """Return the exchanges that a rank takes part in and the bytes that it sends to each peer.

    Args:
        payload: bytes of one token of a shard.
        sums: bytes of the sums of one token; 0 = there are none.
    """
    hops = 0
    bytes_to: dict[int, int] = {}

    def count(message: Message, size: int) -> None:
        tokens = message.span[1] - message.span[0]
        bytes_to[message.peer] = bytes_to.get(message.peer, 0) + tokens * size

    for step in steps(rank, wanted, inner):
        for lane in (NEAR, FAR):
            hops += bool(step.sent[lane] or step.received[lane])
            for message in step.sent[lane]:
                count(message, payload)
        if sums:
            hops += bool(step.sums_sent or step.sums_received)
            if step.sums_sent is not None:
                count(step.sums_sent, sums)
    return hops, bytes_to


def moved(wanted: Table, inner: int) -> tuple[int, int]:
    """Return how many tokens of shards, and of sums, all ranks together send: what `sent` counts, without the steps."""
    paths = _paths(wanted, inner)
    shards = sum(hand.span[1] - hand.span[0] for path in paths for hand in path.hands)
    return shards, sum(hand.span[1] - hand.span[0] for path in paths for hand in path.sums)
