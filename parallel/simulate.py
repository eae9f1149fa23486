"""Move every rank's clock through one layer of attention: what it computes, posts and waits for, as the real one does.

Exchanges are posted before the arithmetic that they can hide behind and waited for after it, exactly as `circulate.py`,
`schedules/all_gather.py` and `heads.py` do. Time comes from `links.py`, work from `workload.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from longctx.parallel import circuit
from longctx.parallel.heads import HeadSplit
from longctx.parallel.links import Speeds
from longctx.parallel.schedule import Schedule, Shape
from longctx.parallel.schedules.all_gather import AllGather
from longctx.parallel.schedules.ring import Ring
from longctx.parallel.workload import Workload

BACKWARD_FLOPS = 2.5
Messages = dict[tuple[int, int], int]  # bytes from a rank to a rank
Clocks = list[float]
Compute = Callable[[int, int, float], float]  # (rank, other team, share of the heads) -> seconds


@dataclass
class Net:
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


class Layer:
    """The two passes of one layer over all ranks."""

    def __init__(self, workload: Workload, schedule: Schedule, shape: Shape, speeds: Speeds, net: Net) -> None:
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
        wanted = circuit.mirrored(self.needs.turned()) if queries else self.needs.keys

        def turned(team: int) -> int:
            """Return a team's place on the circuit, or the team at a place: queries go the other way round."""
            return count - 1 - team if queries else team

        steps = [circuit.steps(turned(team), wanted, inner) for team in range(count)]
        clocks = list(clocks)
        due: list[list[tuple[int, float]]] = [[] for _ in clocks]
        arrival: list[dict[int, float]] = [{} for _ in clocks]  # of shards, by source
        sums_arrival: list[dict[int, float]] = [{} for _ in clocks]

        def post(
            sent: list[circuit.Messages],
            received: list[circuit.Messages],
            size: int,
            at: list[dict[int, float]],
            *,
            done: int | None = None,
        ) -> None:
            """Exchange messages of teams, for each of their members, and note when which shard has arrived.

            All of an exchange is waited for at time `done`, by default when its last message is due.
            """
            messages: Messages = {}
            for rank, (team, member) in self.place.items():
                for message in sent[team]:
                    way = rank, self.teams.members[turned(message.peer)][member]
                    messages[way] = messages.get(way, 0) + (message.span[1] - message.span[0]) * size
            for rank, end in self.net.exchange(clocks, messages).items():
                team = self.place[rank][0]
                last = max(message.due for message in (*sent[team], *received[team]))
                due[rank].append((last if done is None else done, end))
                at[rank].update({message.source: end for message in received[team]})

        for time in range(count):
            here = [steps[team][time] for team in range(count)]
            for rank, waiting in enumerate(due):
                clocks[rank] = max(clocks[rank], *(end for at, end in waiting if at <= time), 0.0)
                due[rank] = [(at, end) for at, end in waiting if at > time]
            for lane in (circuit.NEAR, circuit.FAR):
                post([step.sent[lane] for step in here], [step.received[lane] for step in here], payload, arrival)
            for rank, (team, _) in self.place.items():
                source = here[team].source
                if here[team].needed is not None:
                    clocks[rank] = max(clocks[rank], arrival[rank].get(source, 0.0))
                    clocks[rank] += compute(rank, turned(source), 1.0)
                if sums and here[team].sums_sent is not None:
                    clocks[rank] = max(clocks[rank], sums_arrival[rank].get(source, 0.0))
            if sums:
                leaving: list[circuit.Messages] = [(step.sums_sent,) if step.sums_sent else () for step in here]
                post(leaving, [step.sums_received for step in here], sums, sums_arrival, done=time + 2)
        return [max([clock, *(end for _, end in waiting)]) for clock, waiting in zip(clocks, due, strict=True)]

    def _gather(self, clocks: Clocks, payload: int, sums: int, compute: Compute) -> Clocks:
        """Collect some heads while those before them are computed; gradients go home after each group, exposed."""
        assert isinstance(self.schedule, AllGather)
        step, count = self.schedule.gather_heads, self.teams.count
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
