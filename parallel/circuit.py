"""A circuit: in which order shards go round the ranks, and which messages that takes. Integers only.

All ranks advance in lockstep; at time t each holds the shard of one source. A ring of `size` ranks is split into rings
of `inner` neighbours (one machine, say), themselves on an outer ring: the double ring of LoongTrain (arXiv 2406.18485)
and BurstEngine. With `inner == size` that is the plain ring of Ring Attention (arXiv 2310.01889). A shard goes round an
inner ring while its copy is under way to the next one, so each pair of machines is crossed once per shard.

Sums (dK and dV, or dQ) follow the path of their shard from rank to rank, each adding its own, and go straight home from
the last rank that adds something. The owner's own share waits there: one hop less than the 2 cp - 1 of Ring Attention.

What no later stop needs is not sent on: neither whole shards nor tokens outside the span that is still needed.
"""

from dataclasses import dataclass
from functools import lru_cache

from longctx.parallel.needs import Span, Table, joined_span

NEAR, FAR = 0, 1  # lanes: inside an inner ring, and between them


@dataclass(frozen=True)
class Message:
    """Tokens `span` of `source`'s shard, to or from `peer`."""

    peer: int
    source: int
    span: Span


@dataclass(frozen=True)
class Step:
    """What one rank does while it holds `source`'s shard.

    Attributes:
        source: whose shard is here.
        needed: the tokens of it that this rank computes with; None = nothing.
        near, far: messages posted before computing: (sent, received); received ones arrive for the next step, or for
            the first step of the next inner ring.
        sums_sent: the sums after this rank has added its own: on to the next stop, or home after the last.
        sums_next: sums that arrive for the next step's shard.
        sums_home: sums of this rank's own shard that arrive after this step.
    """

    source: int
    needed: Span | None
    near: tuple[Message | None, Message | None]
    far: tuple[Message | None, Message | None]
    sums_sent: Message | None
    sums_next: Message | None
    sums_home: Message | None


@dataclass(frozen=True)
class _Circuit:
    """The path of every shard, and what is carried along it."""

    size: int
    inner: int

    def stop(self, source: int, time: int) -> int:
        """Return which rank holds source's shard at a time."""
        outer, own = divmod(source, self.inner)
        a, b = divmod(time, self.inner)
        return (outer + a) % (self.size // self.inner) * self.inner + (own + b) % self.inner

    def source(self, rank: int, time: int) -> int:
        """Return whose shard a rank holds at a time: the inverse of `stop`."""
        outer, own = divmod(rank, self.inner)
        a, b = divmod(time, self.inner)
        return (outer - a) % (self.size // self.inner) * self.inner + (own - b) % self.inner

    def near_child(self, time: int) -> int | None:
        """Return the time of the stop that this one hands the shard to inside the inner ring."""
        return time + 1 if (time + 1) % self.inner else None

    def far_child(self, time: int) -> int | None:
        """Return the time of the stop that this one hands the shard to in the next inner ring."""
        return time + self.inner if time % self.inner == 0 and time + self.inner < self.size else None


def order(rank: int, size: int, inner: int) -> tuple[int, ...]:
    """Return whose shard a rank holds at each time; its own comes first."""
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
    paths = [_path(circuit, source, wanted) for source in range(size)]

    def handed_on(source: int, child: int | None, *, peer_time: int | None) -> Message | None:
        if child is None or peer_time is None:
            return None
        span = paths[source].carried[child]
        return None if span is None else Message(circuit.stop(source, peer_time), source, span)

    def hop(time: int, child: int | None) -> tuple[Message | None, Message | None]:
        coming = rank if child is None else circuit.source(rank, child)
        source = circuit.source(rank, time)
        return handed_on(source, child, peer_time=child), handed_on(coming, child, peer_time=time)

    def sums_after(source: int, time: int, *, peer_time: int | None) -> Message | None:
        """Return source's sums as they leave the stop at `time`; `peer_time` None means that they go home."""
        span = paths[source].summed[time]
        peer = source if peer_time is None else circuit.stop(source, peer_time)
        return None if span is None else Message(peer, source, span)

    def step(time: int) -> Step:
        source = circuit.source(rank, time)
        coming = circuit.source(rank, time + 1) if time + 1 < size else rank
        return Step(
            source=source,
            needed=wanted[rank][source],
            near=hop(time, circuit.near_child(time)),
            far=hop(time, circuit.far_child(time)),
            sums_sent=sums_after(source, time, peer_time=time + 1 if time < paths[source].last else None),
            sums_next=sums_after(coming, time, peer_time=time) if time < paths[coming].last else None,
            sums_home=sums_after(rank, time, peer_time=time) if time == paths[rank].last else None,
        )

    return tuple(step(time) for time in range(size))


def sent(rank: int, wanted: Table, inner: int, *, payload: int, sums: int) -> tuple[int, dict[int, int]]:
    """Return the exchanges that a rank takes part in and the bytes that it sends to each peer.

    Args:
        payload: bytes of one token of a shard.
        sums: bytes of the sums of one token; 0 = there are none.
    """
    hops = 0
    bytes_to: dict[int, int] = {}

    def count(message: Message | None, size: int) -> None:
        if message is not None:
            tokens = message.span[1] - message.span[0]
            bytes_to[message.peer] = bytes_to.get(message.peer, 0) + tokens * size

    for step in steps(rank, wanted, inner):
        for exchange in (step.near, step.far):
            hops += any(exchange)
            count(exchange[0], payload)
        if sums:
            hops += any((step.sums_sent, step.sums_next, step.sums_home))
            count(step.sums_sent, sums)
    return hops, bytes_to


@dataclass(frozen=True)
class _Path:
    """What is carried along one shard's path, by time.

    Attributes:
        carried: the tokens that this stop or a later one wants.
        summed: the tokens of the sums when they leave a stop; None before the first stop that adds and after the last.
        last: the last stop that adds to the sums; 0 if none does.
    """

    carried: tuple[Span | None, ...]
    summed: tuple[Span | None, ...]
    last: int


def _path(circuit: _Circuit, source: int, wanted: Table) -> _Path:
    wants = [wanted[circuit.stop(source, time)][source] for time in range(circuit.size)]
    carried = list(wants)
    for time in reversed(range(circuit.size)):
        for child in (circuit.near_child(time), circuit.far_child(time)):
            if child is not None:
                carried[time] = joined_span(carried[time], carried[child])
    last = max((time for time in range(1, circuit.size) if wants[time] is not None), default=0)
    summed: list[Span | None] = [None] * circuit.size
    for time in range(1, last + 1):
        summed[time] = joined_span(summed[time - 1], wants[time])
    return _Path(tuple(carried), tuple(summed), last)
