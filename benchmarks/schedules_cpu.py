"""All schedules side by side on gloo ranks: time, % of ideal, bytes sent, hops and peak memory, forward and backward.

    python benchmarks/schedules_cpu.py             # 2 and 4 ranks of one thread, 8K tokens, MHA and GQA, bfloat16
    python benchmarks/schedules_cpu.py --quick     # does it run?

Four problems: a causal mask on striped and on contiguous shards; a sliding window on contiguous shards, of which only
the halo travels; and the same with everything travelling, as it would if the plan did not know the mask. All schedules
of all problems are measured in the same processes, in turn, in every round; a time is the slowest rank's, the table
has medians over rounds.

ideal     one rank's time for the whole sequence, alone on its core, divided by the cores that the ranks use. More ranks
          than cores share them: the same work in more processes, so the ideal stays that of the cores.
bound     % of ideal that the counted work allows where ranks wait for each other at every hop.
MB sent   by the rank that sends most, forward and backward, counted by the transport. Every rank's bytes to every
          peer, and hops, must be those that `parallel/cost.py` predicts from integers: the run fails otherwise.
peak MB   the most bytes of tensors alive at once in a forward and backward pass beyond q, k, v and dout, on the worst
          rank: what every allocation and free of torch's CPU allocator adds up to, in a pass of its own. Unlike
          resident memory it does not depend on what the allocator keeps. gloo's buffers are not in it.

JSON and PNG go to --out.
"""

import argparse
import os
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
from _ranks import (
    Make,
    OurPass,
    Problem,
    check,
    cores,
    environment,
    local,
    make_problem,
    peak_bytes,
    run,
    start_ranks,
    timed,
    write_report,
)
from _schedules_report import draw, table

from longctx.attention import ContextParallelAttention
from longctx.kernels.mask import Mask, causal, sliding_window
from longctx.parallel.balance import balance
from longctx.parallel.cost import traffic
from longctx.parallel.layout import Layout, LayoutName
from longctx.parallel.needs import Needs
from longctx.parallel.plan import Plan
from longctx.parallel.plan import plan as make_plan
from longctx.parallel.schedule import Schedule, Sent, Shape
from longctx.parallel.schedules.all_gather import AllGather
from longctx.parallel.schedules.ring import DoubleRing, Ring, Ulysses, Usp
from longctx.parallel.transport import ProcessGroupTransport, Traffic

HEADS = {"MHA": (4, 4), "GQA": (4, 2)}


@dataclass(frozen=True)
class Case:
    """A layout and a mask. `halo`: what the mask hides does not travel."""

    name: str
    layout: LayoutName
    mask: Mask
    halo: bool = True


class Column(NamedTuple):
    """What is measured: one schedule on one problem."""

    make: Make
    counted: list[tuple[Sent, Sent]]
    peak: list[int]


def cases(window: int) -> list[Case]:
    """Return the problems."""
    return [
        Case("causal, striped", "striped", causal()),
        Case("causal, contiguous", "contiguous", causal()),
        Case(f"window {window:,}, contiguous", "contiguous", sliding_window(window)),
        Case(f"window {window:,}, contiguous, everything sent", "contiguous", sliding_window(window), halo=False),
    ]


def schedules(ranks: int) -> dict[str, Schedule]:
    """Return what can be told apart on `ranks` ranks; K/V travel in the backward pass unless the name says q."""
    found: dict[str, Schedule] = {
        "ring": Ring(backward_moves="rotate_kv"),
        "ring, q back (burst)": Ring(backward_moves="rotate_q"),
        "all_gather": AllGather(),
        "ulysses": Ulysses(),
    }
    if ranks % 2 == 0 and ranks > 2:
        found[f"double_ring {ranks // 2}x2"] = DoubleRing(backward_moves="rotate_kv", ranks_per_ring=2)
        for innermost in ("ulysses", "ring"):
            usp = Usp(backward_moves="rotate_kv", ulysses=2, innermost=innermost)  # type: ignore[arg-type]
            found[f"usp 2x{ranks // 2}, {innermost} in"] = usp
    return found


def main() -> None:
    """Measure, print the table, write JSON and PNG."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--window", type=int, help="tokens to the left; default tokens / 16")
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="1,024 tokens, 1 round: does it run?")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/schedules_cpu.json"))
    options = parser.parse_args()
    if options.quick:
        options.tokens, options.rounds = 1024, 1
    options.window = options.window or options.tokens // 16
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler writes two lines per pass and rank
    machine = environment()
    rows = [row for ranks in options.ranks for row in start_ranks(measure, ranks, options)]
    problem = {key: value for key, value in vars(options).items() if key != "out"}
    report = {"environment": machine, "problem": {**problem, "heads": HEADS}, "rows": rows}
    print(table(report))
    write_report(options.out, report)
    draw(report, options.out.with_suffix(".png"))
    print(f"written to {options.out} and {options.out.with_suffix('.png')}")


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure every column on one of the ranks; the rows are equal on all."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    workers = min(ranks, cores())
    columns: dict[tuple[str, Case, str], Column] = {}
    alone: dict[tuple[str, Mask], Make] = {}
    for heads, (num, num_kv) in HEADS.items():
        whole = make_problem(options.tokens, num, num_kv, options.head_dim, getattr(torch, options.dtype))
        dim = options.head_dim
        shape = Shape(heads=num, kv_heads=num_kv, head_dim=dim, v_head_dim=dim, dtype=whole.q.dtype)
        for case in cases(options.window):
            make = alone.setdefault((heads, case.mask), local(whole, case.mask))
            truth = run(make)
            for name, schedule in _of_interest(case, ranks):
                layout = Layout(case.layout, ranks)
                column, plan = build(case, layout, schedule, whole)
                one, counted = count(column, plan, shape)
                positions = [layout.positions(each, options.tokens) for each in range(ranks)]
                check(f"{name} ({heads}, {case.name})", one, positions, truth, options.dtype)
                columns[heads, case, name] = Column(column, counted, gathered(peak_bytes(column)))
    times: dict[Any, list[list[float]]] = {key: [] for key in (*alone, *columns)}
    for _ in range(options.rounds):
        for key, make in alone.items():
            times[key].append(timed(make if rank < workers else None))
        for of, column in columns.items():
            times[of].append(timed(column.make))
    ideals = {key: _total(times[key]) / workers for key in alone}
    return [
        row(key, column, times[key], ideals[key[0], key[1].mask], options, workers) for key, column in columns.items()
    ]


def _of_interest(case: Case, ranks: int) -> Iterator[tuple[str, Schedule]]:
    for name, schedule in schedules(ranks).items():
        if case.halo or schedule.teams(ranks).count > 1:  # one team sends no K/V, with or without a halo
            yield name, schedule


def build(case: Case, layout: Layout, schedule: Schedule, whole: Problem) -> tuple[Make, Plan]:
    """Return what makes a pass, and its plan."""
    assert dist.group.WORLD is not None
    transport = ProcessGroupTransport(dist.group.WORLD)
    attention = ContextParallelAttention(layout=layout, schedule=schedule, transport=transport, kernel="torch")
    if case.halo:
        plan = attention.plan([case.mask], total=whole.q.shape[1])
    else:
        with patch("longctx.parallel.plan.needs_of", _everything):  # past the cache, which has the plan with a halo
            plan = make_plan.__wrapped__(layout, (case.mask,), schedule, rank=transport.rank, total=whole.q.shape[1])
    shards = whole.shard(layout, transport.rank)
    return lambda: OurPass(attention, plan, shards), plan


def _everything(layout: Layout, masks: object, teams: Any, *, total: int) -> Needs:
    whole = (0, total // layout.cp * teams.size)
    table = ((whole,) * teams.count,) * teams.count
    return Needs(table, table)


def count(make: Make, plan: Plan, shape: Shape) -> tuple[OurPass, list[tuple[Sent, Sent]]]:
    """Do a pass and return it with what every rank sends forward and backward (collective).

    Raises:
        RuntimeError: another count than the predicted one.
    """
    one = make()
    assert isinstance(one, OurPass)
    counted = []
    for step in (one.forward, one.backward):
        one.attention.transport.traffic = Traffic()
        step()
        found = one.attention.transport.traffic
        counted.append(Sent(found.hops, dict(sorted(found.bytes_to.items()))))
    predicted = [Sent(sent.hops, dict(sorted(sent.bytes_to.items()))) for sent in traffic(plan, shape)]
    everyone = gathered((counted, predicted))
    for rank, (ours, theirs) in enumerate(everyone):
        if ours != theirs:
            raise RuntimeError(f"{plan.schedule} on rank {rank} sent {ours}, predicted were {theirs}")
    return one, [(forward, backward) for (forward, backward), _ in everyone]


def gathered(value: Any) -> list[Any]:
    """Return every rank's value (collective)."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def row(
    key: tuple[str, Case, str],
    column: Column,
    rounds: list[list[float]],
    ideal: float,
    options: argparse.Namespace,
    workers: int,
) -> dict[str, Any]:
    """Return one row of the report."""
    heads, case, name = key
    ranks = dist.get_world_size()
    forward, backward = (statistics.median(part) for part in zip(*rounds, strict=True))
    sent = {
        f"{what}_{direction}": [getattr(rank[index], what) for rank in column.counted]
        for what in ("bytes", "hops")
        for index, direction in enumerate(("forward", "backward"))
    }
    return {
        "ranks": ranks,
        "case": case.name,
        "heads": heads,
        "schedule": name,
        "forward_s": forward,
        "backward_s": backward,
        "total_s": _total(rounds),
        "ideal_s": ideal,
        "percent_of_ideal": 100 * ideal / _total(rounds),
        "percent_of_ideal_bound": 100 * bound(case, schedules(ranks)[name], ranks, options.tokens, workers),
        **sent,
        "peak_bytes": column.peak,
        "rounds_s": rounds,
    }


def bound(case: Case, schedule: Schedule, ranks: int, tokens: int, workers: int) -> float:
    """Return ideal / critical path of the counted pairs, where `ranks` ranks wait for each other at every hop and share
    `workers` cores: a hop takes as long as its busiest rank, and at least its work over the cores."""
    work = balance(Layout(case.layout, ranks), [case.mask], schedule, total=tokens)
    members = schedule.teams(ranks).size  # of a team, which share its heads and so its pairs
    critical = sum(max(max(hop) / members, sum(hop) / workers) for hop in zip(*work.pairs, strict=True))
    return work.total / workers / critical


def _total(rounds: list[list[float]]) -> float:
    return statistics.median(map(sum, rounds))


if __name__ == "__main__":
    main()
