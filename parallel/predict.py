"""Predict how long a layer of attention takes, forward and backward, from the plan's integers and a few speeds.

Every rank's clock is moved through what it would do: exchanges are posted before the arithmetic that they can hide
behind and waited for after it, exactly as `circulate.py`, `schedules/all_gather.py` and `heads.py` do.

    compute  = calls x call + FLOPs / flops      FLOPs = 2 (D + Dv) per visible pair and head; backward 2.5 x as many
    exchange = latency + bytes / bandwidth       from when both ends have posted it and the link is free; the slower of
                                                 both directions, and of the machine's own links and the network

Left out: the merges of partial results, memory, what a kernel computes outside the mask, and contention.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from longctx.parallel import circuit
from longctx.parallel.heads import HeadSplit
from longctx.parallel.layout import Layout
from longctx.parallel.links import Speeds
from longctx.parallel.schedule import Schedule, Shape
from longctx.parallel.schedules.all_gather import AllGather
from longctx.parallel.schedules.ring import Ring
from longctx.parallel.workload import Counter, Workload

BACKWARD_FLOPS = 2.5
Messages = dict[tuple[int, int], int]  # bytes from a rank to a rank
Clocks = list[float]
Compute = Callable[[int, int, float], float]  # (rank, other team, share of the heads) -> seconds


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A layer's times in seconds and bytes, each of the rank that has most.

    Attributes:
        forward, backward: until the last rank is done.
        ideal: the visible pairs' FLOPs, shared evenly by the ranks, and nothing else.
        compute: of the busiest rank, both passes.
        bytes, far_bytes: sent in both passes; to other machines.
        sampled: documents that stood for all when work was counted; None = all were counted.
    """

    layout: Layout
    schedule: Schedule
    forward: float
    backward: float
    ideal: float
    compute: float
    bytes: int
    far_bytes: int
    sampled: int | None = None

    @property
    def seconds(self) -> float:
        """Return the time of both passes."""
        return self.forward + self.backward

    @property
    def exposed(self) -> float:
        """Return the time in which the busiest rank computes nothing: messages and slower ranks are waited for."""
        return self.seconds - self.compute

    @property
    def efficiency(self) -> float:
        """Return ideal / predicted."""
        return self.ideal / self.seconds if self.seconds else 1.0


def predict(
    layout: Layout,
    schedule: Schedule,
    counter: Counter,
    *,
    shape: Shape,
    speeds: Speeds,
    per_machine: int,
) -> Prediction:
    """Predict one sequence through one layer.

    Args:
        counter: counts the sequence's work under its mask.
        shape: the heads of the whole layer.
        per_machine: neighbouring ranks of the group that are on one machine; the first rank begins one.

    Raises:
        ValueError: ranks or heads that the schedule cannot arrange.
    """
    schedule.check(layout.cp, heads=shape.heads, kv_heads=shape.kv_heads)
    workload = counter.workload(layout, schedule)
    layer = _Layer(workload, schedule, shape, speeds, _Net(layout.cp, per_machine, speeds))
    forward = max(layer.forward())
    layer.net.rest()
    backward = max(layer.backward())
    flops = (1 + BACKWARD_FLOPS) * workload.total_pairs * layer.flops_per_pair
    return Prediction(
        layout=layout,
        schedule=schedule,
        forward=forward,
        backward=backward,
        ideal=flops / layout.cp / speeds.flops,
        compute=max(layer.busy),
        bytes=max(layer.net.sent),
        far_bytes=max(layer.net.sent_far),
        sampled=workload.sampled,
    )


@dataclass
class _Net:
    """Links of all ranks: each has one inside its machine and one to the others, and both go both ways at once."""

    ranks: int
    per_machine: int
    speeds: Speeds
    free: list[list[float]] = field(init=False)
    sent: list[int] = field(init=False)
    sent_far: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.sent, self.sent_far = [0] * self.ranks, [0] * self.ranks
        self.rest()

    def rest(self) -> None:
        """Let all messages have arrived: another pass begins at time 0."""
        self.free = [[0.0, 0.0] for _ in range(self.ranks)]

    def exchange(self, clocks: Clocks, messages: Messages) -> dict[int, float]:
        """Post messages at every rank's time and return when each rank that takes part is done."""
        start: dict[int, float] = {}
        load: dict[int, list[list[int]]] = {}  # by rank: [link][direction] bytes
        for (source, target), size in messages.items():
            far = source // self.per_machine != target // self.per_machine
            self.sent[source] += size
            self.sent_far[source] += size * far
            ready = max(clocks[source], clocks[target], self.free[source][far], self.free[target][far])
            for rank, direction in ((source, 0), (target, 1)):
                start[rank] = max(start.get(rank, 0.0), ready)
                load.setdefault(rank, [[0, 0], [0, 0]])[far][direction] += size
        done = {}
        for rank, (inside, beyond) in load.items():
            times = max(inside) / self.speeds.local, max(beyond) / self.speeds.network
            for link, seconds in enumerate(times):
                if seconds:
                    self.free[rank][link] = start[rank] + seconds
            done[rank] = start[rank] + self.speeds.latency + max(times)
        arrived = dict(done)
        for source, target in messages:
            arrived[target] = max(arrived[target], done[source])
        return arrived


class _Layer:
    """The two passes of one layer over all ranks."""

    def __init__(self, workload: Workload, schedule: Schedule, shape: Shape, speeds: Speeds, net: _Net) -> None:
        self.workload, self.schedule, self.speeds, self.net = workload, schedule, speeds, net
        self.teams, self.needs = workload.teams, workload.needs
        split = HeadSplit(shape.heads, shape.kv_heads, self.teams.size)
        self.heads, self.kv_heads, self.repeats_kv = len(split.q(0)), len(split.kv(0)), split.repeats_kv
        self.low, self.wide = shape.dtype.itemsize, shape.wide.itemsize
        self.q_dims, self.v_dims = shape.head_dim, shape.v_head_dim
        self.flops_per_pair = 2 * (shape.head_dim + shape.v_head_dim)
        self.moves_queries = schedule.moves_queries(
            Shape(
                heads=self.heads,
                kv_heads=self.kv_heads,
                head_dim=shape.head_dim,
                v_head_dim=shape.v_head_dim,
                dtype=shape.dtype,
            )
        )
        self.place = {r: (t, m) for t, members in enumerate(self.teams.members) for m, r in enumerate(members)}
        self.busy = [0.0] * net.ranks

    @property
    def kv(self) -> int:
        """Return the numbers of one token's k and v."""
        return self.kv_heads * (self.q_dims + self.v_dims)

    def forward(self) -> Clocks:
        """Return when each rank is done."""
        q, out = self.heads * self.q_dims, self.heads * self.v_dims
        clocks = self._all_to_all([0.0] * self.net.ranks, (q + self.kv) * self.low)
        clocks = self._circulate(clocks, payload=self.kv * self.low, sums=0, flops=1.0, queries=False)
        return self._all_to_all(clocks, out * self.low)

    def backward(self) -> Clocks:
        """Return when each rank is done, with all ranks starting at 0."""
        q, out, kv = self.heads * self.q_dims, self.heads * self.v_dims, self.kv
        clocks = self._all_to_all([0.0] * self.net.ranks, out * self.low + self.heads * self.wide)
        if self.moves_queries:
            payload, sums = (q + out) * self.low + 2 * self.heads * self.wide, q * self.wide
        else:
            payload, sums = kv * self.low, kv * self.wide
        clocks = self._circulate(clocks, payload=payload, sums=sums, flops=BACKWARD_FLOPS, queries=self.moves_queries)
        return self._all_to_all(clocks, q * self.low + kv * (self.wide if self.repeats_kv else self.low))

    def _all_to_all(self, clocks: Clocks, token: int) -> Clocks:
        """Swap heads for tokens inside of teams, or back; nothing hides it."""
        if self.teams.size == 1:
            return clocks
        size = self.workload.total // self.net.ranks * token
        messages = {(a, b): size for members in self.teams.members for a in members for b in members if a != b}
        return _waited(clocks, self.net.exchange(clocks, messages))

    def _circulate(self, clocks: Clocks, *, payload: int, sums: int, flops: float, queries: bool) -> Clocks:
        def compute(rank: int, other: int, share: float) -> float:
            """Return the seconds of a rank's work with what came from another team."""
            team, member = self.place[rank]
            pairs, calls = self.workload.of(member, *((other, team) if queries else (team, other)))
            seconds = calls * self.speeds.call + share * flops * pairs * self.flops_per_pair / self.speeds.flops
            self.busy[rank] += seconds
            return seconds

        if isinstance(self.schedule, AllGather):
            return self._gather(clocks, payload, sums, compute)
        assert isinstance(self.schedule, Ring), self.schedule
        return self._ring(clocks, payload, sums, compute, queries=queries)

    def _ring(self, clocks: Clocks, payload: int, sums: int, compute: Compute, *, queries: bool) -> Clocks:
        assert isinstance(self.schedule, Ring)
        count = self.teams.count
        inner = self.schedule.inner(count)
        wanted = self.needs.turned() if queries else self.needs.keys
        steps = [circuit.steps(team, wanted, inner) for team in range(count)]
        clocks = list(clocks)
        due: list[list[tuple[int, float]]] = [[] for _ in clocks]
        sums_at = [0.0] * len(clocks)

        def post(time: int, lane: str, size: int) -> dict[int, float]:
            messages: Messages = {}
            for rank, (team, member) in self.place.items():
                step = steps[team][time]
                message = step.sums_sent if lane == "sums" else getattr(step, lane)[0]
                if message is not None:
                    target = self.teams.members[message.peer][member]
                    messages[rank, target] = (message.span[1] - message.span[0]) * size
            return self.net.exchange(clocks, messages) if messages else {}

        for time in range(count):
            for rank, waiting in enumerate(due):
                clocks[rank] = max(clocks[rank], *(end for at, end in waiting if at <= time), 0.0)
                due[rank] = [(at, end) for at, end in waiting if at > time]
            for lane, at in (("near", time + 1), ("far", time + inner)):
                for rank, end in post(time, lane, payload).items():
                    due[rank].append((at, end))
            for rank, (team, _) in self.place.items():
                step = steps[team][time]
                if step.needed is not None:
                    clocks[rank] += compute(rank, step.source, 1.0)
                if sums and step.sums_sent is not None:
                    clocks[rank] = max(clocks[rank], sums_at[rank])
            if sums:
                for rank, end in post(time, "sums", sums).items():
                    sums_at[rank] = end
                    due[rank].append((time + 2, end))
        return [max([clock, *(end for _, end in waiting)]) for clock, waiting in zip(clocks, due, strict=True)]

    def _gather(self, clocks: Clocks, payload: int, sums: int, compute: Compute) -> Clocks:
        """Collect some heads while those before them are computed; gradients go home after each group, exposed."""
        assert isinstance(self.schedule, AllGather)
        step, count = self.schedule.heads_per_gather, self.teams.count
        groups = [(min(first + step, self.kv_heads) - first) for first in range(0, self.kv_heads, step)]
        spans = [
            (reader, owner, span[1] - span[0])
            for reader in range(count)
            for owner in range(count)
            if reader != owner and (span := self.needs.keys[reader][owner]) is not None
        ]

        def collect(heads: int) -> dict[int, float]:
            size = payload * heads // self.kv_heads
            return self.net.exchange(clocks, {(owner, reader): tokens * size for reader, owner, tokens in spans})

        arriving = collect(groups[0])
        for index, heads in enumerate(groups):
            clocks = _waited(clocks, arriving)
            arriving = collect(groups[index + 1]) if index + 1 < len(groups) else {}
            for rank in range(count):
                for source in range(count):
                    if self.needs.keys[rank][source] is not None:
                        clocks[rank] += compute(rank, source, heads / self.kv_heads)
            if sums:
                size = sums * heads // self.kv_heads
                home = {(reader, owner): tokens * size for reader, owner, tokens in spans}
                clocks = _waited(clocks, self.net.exchange(clocks, home))
        return clocks


def _waited(clocks: Clocks, done: dict[int, float]) -> Clocks:
    return [max(clock, done.get(rank, 0.0)) for rank, clock in enumerate(clocks)]
