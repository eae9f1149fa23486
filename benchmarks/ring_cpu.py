"""Ring attention on CPU: causal attention forward and backward over gloo ranks, one thread per rank.

    python benchmarks/ring_cpu.py                  # 2 ranks, 16K tokens, 4 heads of 64, float32 and bfloat16
    python benchmarks/ring_cpu.py --help

Every column is measured in the same processes, in turn, in every round; a time is the slowest rank's, and the table
holds medians over rounds. `local` is each rank computing the whole sequence alone with the same kernel, all ranks at
once: its time divided by the number of ranks is the ideal. `ring-attention-pytorch` is measured too where it is
installed (`pip install ring-attention-pytorch`), on the same problem in float32, with its striped ring. JSON and PNG
go to --out.
"""

import argparse
import statistics
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from _ranks import (
    PARTS,
    Make,
    OurPass,
    Pass,
    Problem,
    check,
    environment,
    local,
    make_problem,
    run,
    start_ranks,
    timed,
    write_report,
)
from torch import Tensor

from longctx.attention import ContextParallelAttention
from longctx.kernels.mask import causal
from longctx.parallel.balance import balance
from longctx.parallel.layout import Layout
from longctx.parallel.registry import resolve_schedule
from longctx.parallel.transport import ProcessGroupTransport

LAYOUTS = ("contiguous", "zigzag", "striped")
PEER = "ring-attention-pytorch"
PEER_BUCKET = 1024  # its default


def main() -> None:
    """Measure, print the table, write JSON and PNG."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-peer", action="store_true", help=f"leave {PEER} out even if it is installed")
    parser.add_argument("--quick", action="store_true", help="4,096 tokens, 1 round: does it run?")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/ring_cpu.json"))
    options = parser.parse_args()
    if options.quick:
        options.tokens, options.rounds = 4096, 1
    seconds = start_ranks(measure, options.ranks, options)
    problem = {key: value for key, value in vars(options).items() if key != "out"}
    report = {"environment": environment(PEER), "problem": problem, "rows": rows(options, seconds)}
    print(table(options, report["rows"]))
    write_report(options.out, report)
    draw(report["rows"], options.out.with_suffix(".png"), options)
    print(f"written to {options.out} and {options.out.with_suffix('.png')}")


def measure(options: argparse.Namespace) -> dict[str, dict[str, list[list[float]]]]:
    """Time every column on one rank: {dtype: {column: [[forward, backward] per round]}}."""
    results: dict[str, dict[str, list[list[float]]]] = {}
    for dtype in options.dtypes:
        columns = build_columns(options, dtype)
        times: dict[str, list[list[float]]] = {name: [] for name in columns}
        for _ in range(options.rounds):
            for name, make in columns.items():
                times[name].append(timed(make))
        results[dtype] = times
    return results


def build_columns(options: argparse.Namespace, dtype: str) -> dict[str, Make]:
    """Return what is measured, warm and found to be right."""
    whole = make_problem(options.tokens, options.heads, options.kv_heads, options.head_dim, getattr(torch, dtype))
    columns: dict[str, Make] = {"local": local(whole, causal())}
    truth, rank = run(columns["local"]), dist.get_rank()

    def add(name: str, make: Make, positions: list[Tensor], parts: tuple[str, ...] = PARTS) -> None:
        check(name, run(make), positions, truth, dtype, parts=parts)
        columns[name] = make

    for name in LAYOUTS:
        layout = Layout(name, options.ranks)  # type: ignore[arg-type]
        assert dist.group.WORLD is not None
        attention = ContextParallelAttention(
            layout=layout,
            schedule=resolve_schedule("ring"),
            transport=ProcessGroupTransport(dist.group.WORLD),
            kernel="torch",
        )
        plan = attention.plan([causal()], total=options.tokens)
        shards = whole.shard(layout, rank)
        positions = [layout.positions(each, options.tokens) for each in range(options.ranks)]
        add(name, lambda a=attention, p=plan, s=shards: OurPass(a, p, s), positions)  # type: ignore[misc]
    # The peer's CPU path multiplies float32 with the input dtype, so it runs in float32 only.
    peer_runs = dtype == "float32" and options.heads == options.kv_heads and not options.no_peer
    if find_spec("ring_attention_pytorch") and peer_runs:
        # It stripes so that each bucket of consecutive local tokens is spread over the whole sequence.
        positions = list(torch.arange(options.tokens).view(PEER_BUCKET, -1).t().flatten().chunk(options.ranks))
        shards = Problem(*(x[:, positions[rank]] for x in whole))
        # In 0.5.20 dk and dv are sent home as one tensor and come out mixed up (`dk, dv = ring_pass(...)`): the same
        # work, so it is timed, but only what is right can be compared.
        add(PEER, lambda: PeerPass(shards, options.ranks), positions, ("out", "dq"))
    return columns


class PeerPass(Pass):
    """ring-attention-pytorch's striped ring on the same shards."""

    def __init__(self, shards: Problem, ranks: int) -> None:
        from ring_attention_pytorch.ring_flash_attention import ring_flash_attn

        super().__init__(shards)
        self.attend, self.ranks = ring_flash_attn, ranks

    def forward(self) -> None:
        self.out = self.attend(
            self.q,
            self.k,
            self.v,
            causal=True,
            bucket_size=PEER_BUCKET,
            ring_reduce_col=True,
            striped_ring_attn=True,
            ring_size=self.ranks,
        )


def rows(options: argparse.Namespace, seconds: dict[str, dict[str, list[list[float]]]]) -> list[dict[str, Any]]:
    """Turn seconds into medians and ratios of medians."""
    result = []
    for dtype, columns in seconds.items():
        median = {n: [statistics.median(part) for part in zip(*rounds, strict=True)] for n, rounds in columns.items()}
        total = {n: statistics.median(map(sum, rounds)) for n, rounds in columns.items()}
        ideal = total["local"] / options.ranks
        for name in columns:
            if name == "local":
                theory = 1.0
            else:
                layout = Layout("striped" if name == PEER else name, options.ranks)  # type: ignore[arg-type]
                theory = balance(layout, [causal()], resolve_schedule("ring"), total=options.tokens).efficiency
            result.append(
                {
                    "dtype": dtype,
                    "column": name,
                    "forward_s": median[name][0],
                    "backward_s": median[name][1],
                    "total_s": total[name],
                    "percent_of_ideal": None if name == "local" else 100 * ideal / total[name],
                    "percent_of_ideal_in_theory": None if name == "local" else 100 * theory,
                    "speedup_over_contiguous": total["contiguous"] / total[name],
                    "rounds_s": columns[name],
                }
            )
    return result


def table(options: argparse.Namespace, measured: list[dict[str, Any]]) -> str:
    """Format the rows for a terminal."""
    lines = [
        f"causal attention forward + backward, {options.tokens:,} tokens, H={options.heads} HK={options.kv_heads} "
        f"D={options.head_dim}, {options.ranks} gloo ranks, 1 thread each, medians of {options.rounds} rounds",
        "",
        f"{'dtype':9} {'':22} {'forward':>9} {'backward':>9} {'total':>9} "
        f"{'of ideal':>9} {'in theory':>9} {'vs contig.':>10}",
    ]
    for row in measured:
        ideal, theory = row["percent_of_ideal"], row["percent_of_ideal_in_theory"]
        name = "local (whole, alone)" if row["column"] == "local" else row["column"]
        lines.append(
            f"{row['dtype']:9} {name:22} {row['forward_s']:8.3f}s {row['backward_s']:8.3f}s {row['total_s']:8.3f}s "
            + (f"{ideal:8.1f}% {theory:8.1f}% " if ideal else f"{'':9} {'':9} ")
            + (f"{row['speedup_over_contiguous']:9.2f}x" if ideal else "")
        )
    return "\n".join(lines)


def draw(measured: list[dict[str, Any]], path: Path, options: argparse.Namespace) -> None:
    """Draw % of ideal per layout and dtype, with the theoretical bound."""
    from matplotlib.figure import Figure

    ours = [row for row in measured if row["column"] in LAYOUTS]
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for index, row in enumerate(ours):
        label = f"{row['column']}\n{row['dtype']}"
        axes.bar(label, row["percent_of_ideal"], color={"float32": "tab:blue"}.get(row["dtype"], "tab:orange"))
        axes.plot([index - 0.4, index + 0.4], [row["percent_of_ideal_in_theory"]] * 2, color="black", lw=1.5)
    axes.set_ylabel("% of ideal (line: the layout's bound)")
    axes.set_title(
        f"Ring attention on {options.ranks} CPU ranks, {options.tokens:,} tokens, forward + backward", fontsize=10
    )
    axes.set_ylim(0, 110)
    axes.grid(axis="y", alpha=0.3)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
