"""Linear attention on CPU: speed over the length of the sequence, over kinds, and over ranks. One thread per rank.

    python benchmarks/linear_cpu.py                     # an idle machine and 10 GB of memory; some minutes
    python benchmarks/linear_cpu.py --fla FOLDER        # where flash-linear-attention lies, if it is not installed
    python benchmarks/linear_cpu.py --quick             # short sequences, 1 round: does it run?

Forward and backward, float32, one sequence, medians over rounds of the slowest rank's time. Four questions, each of
which fails the run (exit status 1) if the answer is no:

lengths   is lightning as fast, in tokens per second, at the longest sequence as at 8K tokens, within 15%? Softmax
          attention beside it, up to the length that takes --patience seconds, shows where the two cross. Peak memory:
          the most bytes of tensors alive at once beyond q, k, v and dout.
ranks     do two ranks with contiguous shards take at most 1 / 1.7 of the time of one? Only asked from 64K tokens on
          and where every rank has a core of its own.
bytes     does a rank send as many bytes of states at 16 times the length, and what the formula of its method says?
kinds     is every kind in chunks at least 20 times as fast as token by token, with one head, and with --heads not
          slower than the plain torch code of flash-linear-attention, where that can be imported? Only asked at 16K
          tokens. The results are compared too.

JSON and PNG go to --out; parts that it has already are kept, if they are of the same problem and machine.
"""

import argparse
import json
import math
import os
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from _linear_passes import KINDS, Inputs, LinearPass, alone, make_inputs, peer, shared, softmax
from _linear_report import draw, table, wrong
from _ranks import WRONG, Make, Pass, cores, environment, peak_bytes, run, start_ranks, timed, write_report

from longctx.linear_attention import ContextParallelLinearAttention
from longctx.parallel.layout import Layout
from longctx.parallel.state_passing import PASSINGS, resolve_passing
from longctx.parallel.transport import ProcessGroupTransport, Traffic

PEER = "flash-linear-attention"
PARTS = ("lengths", "ranks", "bytes", "kinds")
Row = dict[str, Any]


def main() -> None:
    """Measure, print the tables, write JSON and PNG, and say what is not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--longest", type=int, default=512, help="K tokens")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--shared", type=int, nargs="+", default=[16, 64, 256], help="K tokens that ranks share")
    parser.add_argument("--tokens", type=int, default=16, help="K tokens of the comparison of kinds")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--patience", type=float, default=30.0, help="seconds for a pass of softmax attention")
    parser.add_argument("--fla", type=Path, help="folder that has the package fla")
    parser.add_argument("--quick", action="store_true", help="at most 8K tokens, 1 round")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/linear_cpu.json"))
    options = parser.parse_args()
    if options.quick:
        options.longest, options.shared, options.tokens, options.rounds, options.patience = 8, [1, 4], 1, 1, 0.2
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler writes two lines per pass
    share = cores() < options.ranks
    problem = {key: value for key, value in vars(options).items() if key not in ("out", "fla", "parts")}
    machine = environment(PEER)
    code = machine.pop("longctx")
    report: dict[str, Any] = {"environment": machine, "problem": problem, "ranks_share_cores": share}
    if options.out.exists():
        before = json.loads(options.out.read_text())
        if all(before.get(key) == report[key] for key in report):
            report = before
    if share:
        print(f"{options.ranks} ranks share {cores()} cores: their times say nothing of what ranks gain")
    # Of three ranks and more, some pass on transitions and what is not their own.
    ranks = {"lengths": 1, "ranks": options.ranks, "bytes": max(4, options.ranks), "kinds": 1}
    for part in options.parts:
        report[part] = start_ranks(MEASURES[part], ranks[part], options)
        report.setdefault("code", {})[part] = code
        print("\n" + table(part, report[part], options), flush=True)
        write_report(options.out, report)
    draw(report, options.out.with_suffix(".png"))
    print(f"\nwritten to {options.out} and {options.out.with_suffix('.png')}")
    found = wrong(report)
    print("\n".join(found) or "all as it should be")
    sys.exit(bool(found))


def seconds(make: Make | None, rounds: int) -> float:
    """Return the median time of a forward and backward pass, the first one not counted (collective)."""
    times = [sum(timed(make)) for _ in range(rounds + 1)]
    return statistics.median(times[1:])


def measure_lengths(options: argparse.Namespace) -> list[Row]:
    """Time lightning and softmax attention from 256 tokens on, alone.

    Lightning takes a round of all lengths after the other, so that what else the machine does meets every length. Of
    two passes the second counts: virtual machines give back what is free for some seconds, and are slow to get it.
    """
    lengths = [256 * 2**power for power in range(int(math.log2(4 * options.longest)) + 1)]
    times: list[list[float]] = [[] for _ in lengths]
    for _ in range(options.rounds + 1):
        for tokens, own in zip(lengths, times, strict=True):
            inputs = make_inputs("lightning", tokens, options.heads, options.head_dim)
            make = partial(LinearPass, alone("torch"), inputs)
            own.append([sum(timed(make)) for _ in range(2)][-1])
    rows, patient = [], True
    for tokens, own in zip(lengths, times, strict=True):
        inputs = make_inputs("lightning", tokens, options.heads, options.head_dim)
        row = {"tokens": tokens, "lightning_s": statistics.median(own[1:])}
        row["peak_bytes"] = peak_bytes(partial(LinearPass, alone("torch"), inputs))
        if patient:
            row["softmax_s"] = seconds(partial(softmax, inputs), options.rounds if tokens <= 8192 else 1)
            patient = 4 * row["softmax_s"] <= options.patience
        rows.append(row)
    return rows


def measure_ranks(options: argparse.Namespace) -> list[Row]:
    """Time lightning on one of the ranks, the others waiting, and on all of them, with every state passing.

    And `apart`: every rank its share as if it were a sequence of its own, which is all that the machine has to give.
    Rounds of all of them, one after the other.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    rows = []
    for tokens in (1024 * each for each in options.shared):
        whole = make_inputs("lightning", tokens, options.heads, options.head_dim)
        mine = whole.shard(Layout("contiguous", ranks), rank)
        makes: dict[str, Make | None] = {"one": partial(LinearPass, alone("torch"), whole) if rank == 0 else None}
        makes["apart"] = partial(LinearPass, alone("torch"), mine)
        for passing in PASSINGS:
            attention = attention_over(passing)
            plan = attention.plan(None, total=tokens, device=torch.device("cpu"))
            makes[passing] = partial(LinearPass, shared(attention, plan), mine)
        times = {name: [sum(timed(make))] for name, make in makes.items()}
        for _ in range(2 * options.rounds):
            for name, make in makes.items():
                times[name].append(sum(timed(make)))
        took = {name: statistics.median(each[1:]) for name, each in times.items()}
        for name in ("apart", *PASSINGS):
            rows.append(
                {"tokens": tokens, "passing": name, "ranks": ranks, "one_s": took["one"], "ranks_s": took[name]}
            )
    return rows


def measure_bytes(options: argparse.Namespace) -> list[Row]:
    """Count what each rank sends, forward and backward, for a transition of each shape, at the two ends of lengths."""
    heads, size = options.heads, options.head_dim
    shapes = {"lightning": 1, "gla": size, "gdn": size * size}  # numbers of a transition, of one head
    rows = []
    for kind, numbers in shapes.items():
        for tokens in (1024 * min(options.shared), 1024 * max(options.shared)):
            whole = make_inputs(kind, tokens, heads, size)
            for passing in PASSINGS:
                attention = attention_over(passing)
                sizes = {"transition_bytes": 4 * heads * numbers, "state_bytes": 4 * heads * size * size}
                everyone: list[Any] = [None] * dist.get_world_size()
                dist.all_gather_object(everyone, count(attention, whole, **sizes))
                sent, formula = zip(*everyone, strict=True)
                rows.append({"kind": kind, "tokens": tokens, "passing": passing, "sent": sent, "formula": formula})
    return rows


def count(attention: ContextParallelLinearAttention, whole: Inputs, **sizes: int) -> tuple[list[int], list[int]]:
    """Return the bytes that this rank sends forward and backward, and those of the method's formula."""
    rank = dist.get_rank()
    plan = attention.plan(None, total=whole.q.shape[1], device=torch.device("cpu"))
    one = LinearPass(shared(attention, plan), whole.shard(attention.layout, rank))
    counted = []
    for step in (one.forward, one.backward):
        attention.transport.traffic = Traffic()
        step()
        counted.append(attention.transport.traffic.bytes)
    return counted, [attention.passing.sent(each, rank, **sizes).bytes for each in (plan.chain, plan.chain.reversed())]


def measure_kinds(options: argparse.Namespace) -> list[Row]:
    """Time every kind in chunks, token by token, and flash-linear-attention's plain torch code, alone.

    Token by token the time is that of some dozen small operations, as good as the same for one head as for four.
    """
    rows = []
    for heads in (1, options.heads):
        for kind in KINDS:
            inputs = make_inputs(kind, 1024 * options.tokens, heads, options.head_dim)
            chunks = partial(LinearPass, alone("torch"), inputs)
            row: Row = {"kind": kind, "heads": heads, "tokens": 1024 * options.tokens}
            row["chunks_s"] = seconds(chunks, options.rounds)
            row["recurrent_s"] = compared(kind, chunks, partial(LinearPass, alone("reference"), inputs))
            theirs = peer(kind, options.fla) if heads == options.heads else None
            if theirs is not None:
                make = partial(LinearPass, theirs, inputs)
                row["fla_s"] = compared(kind, chunks, make)
                if row["fla_s"] < 5 * row["chunks_s"]:
                    row["fla_s"], row["chunks_s"] = side_by_side([make, chunks], options.rounds)
                row["fla"] = getattr(sys.modules["fla"], "__version__", None)
            rows.append(row)
    return rows


def side_by_side(makes: list[Make], rounds: int) -> list[float]:
    """Return median times of rounds of all passes."""
    return [
        statistics.median(times)
        for times in zip(*([sum(timed(make)) for make in makes] for _ in range(rounds)), strict=True)
    ]


def compared(kind: str, ours: Make, make: Make) -> float:
    """Return the time of a pass, unless its results differ from ours."""
    theirs, took = make(), time.perf_counter()
    theirs.forward()
    theirs.backward()
    took = time.perf_counter() - took
    compare(kind, run(ours), theirs)
    return took


def compare(kind: str, ours: Pass, theirs: Pass) -> None:
    """Refuse to time what is wrong."""
    for mine, other in zip((ours.out, *ours.grads), (theirs.out, *theirs.grads), strict=True):
        error = ((mine - other).norm() / other.norm()).item()
        if not error <= WRONG["float32"]:
            raise RuntimeError(f"{kind}: results differ by {error:.1e}: not timed")


def attention_over(passing: str) -> ContextParallelLinearAttention:
    """Return linear attention over all ranks, contiguous."""
    group = dist.group.WORLD
    assert group is not None
    return ContextParallelLinearAttention(
        layout=Layout("contiguous", dist.get_world_size()),
        passing=resolve_passing(passing),
        transport=ProcessGroupTransport(group),
        kernel="torch",
    )


MEASURES = {"lengths": measure_lengths, "ranks": measure_ranks, "bytes": measure_bytes, "kinds": measure_kinds}


if __name__ == "__main__":
    main()
