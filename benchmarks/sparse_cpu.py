"""Block-sparse attention against dense: time over density, memory over length, routing and a whole layer apart.

    python benchmarks/sparse_cpu.py                      # an idle machine, 8 GB of memory; 15 minutes
    python benchmarks/sparse_cpu.py --quick              # short sequences, 1 round: does it run?
    python benchmarks/sparse_cpu.py --device cuda        # on a GPU, bfloat16, flex_attention beside ours

Forward and backward of one causal document on one rank (one thread on a CPU), medians of rounds in which all columns
take turns. A query selects blocks as MoBA does (arXiv 2502.13189): `density` is what it sees over what dense attention
would show it. `kernel` is attention to a selection that is there, `routing` the choice of it from q and k, `layer` a
whole decoder block with norms, projections and MLP, routing included. flex_attention takes a table of blocks of
queries, so on a GPU all queries of a block select what their last one does.

Three questions, each of which fails the run (exit status 1) if the answer is no, at 64K tokens on a CPU:

density   is the kernel at least 6 times as fast as dense at density 1/16, and 10 times at 1/32?
memory    do the bytes per token stay the same, within 15%, from a quarter of the length to all of it?
numbers   is the kernel's result that of the reference, at a short length?
"""

import argparse
import os
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from _device import Steps, clock, surroundings, timed
from _ranks import Pass, Problem, environment, make_problem, peak_bytes, write_report
from _sparse_passes import (
    DensePass,
    FlexPass,
    LayerPass,
    SelectedPass,
    alike_in_blocks,
    pairs_of,
    route,
    selection_of,
)

from longctx.kernels.block_sparse.reference import selected_attention

LEAST = {16: 6.0, 32: 10.0}  # times as fast as dense, by 1 / density, at this many tokens:
ASKED_AT = 65_536
FLAT = 1.15  # bytes per token at all of the length, over those at a quarter of it
EXACT = 1e-4  # of the largest output, float32; bfloat16 has 3e-2
Row = dict[str, Any]


def main() -> None:
    """Measure, print the tables, write JSON and PNG, and say what is not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--tokens", type=int, default=ASKED_AT)
    parser.add_argument("--blocks", type=int, nargs="+", default=[128, 512], help="tokens of a block")
    parser.add_argument("--densities", type=int, nargs="+", default=[8, 16, 32], help="1 / density")
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--kv-heads", type=int, default=1)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--kernel", default="auto", help="auto | torch | triton")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="2K tokens, 1 round")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/sparse_cpu.json"))
    options = parser.parse_args()
    if options.quick:
        options.tokens, options.blocks, options.rounds = 2048, [64], 1
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU")
    torch.set_num_threads(options.threads)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler writes two lines per pass
    device = torch.device(options.device)
    problem_of = {key: value for key, value in vars(options).items() if key != "out"}
    machine = environment("triton") if device.type == "cpu" else surroundings(device)
    report: dict[str, Any] = {"environment": machine, "problem": problem_of}
    report["numbers"] = numbers(options, device)
    report["speed"] = speed(options, device)
    print(speed_table(report["speed"], options), flush=True)
    report["memory"] = memory(options) if device.type == "cpu" else []
    print(memory_table(report["memory"]), flush=True)
    write_report(options.out, report)
    draw(report, options.out.with_suffix(".png"))
    print(f"written to {options.out} and {options.out.with_suffix('.png')}")
    found = wrong(report)
    print("\n".join(found) or "all as it should be")
    sys.exit(bool(found))


def problem(options: argparse.Namespace, tokens: int, device: torch.device) -> Problem:
    """Return q, k, v, dout: float32 on a CPU, bfloat16 on a GPU."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    whole = make_problem(tokens, options.heads, options.kv_heads, options.head_dim, dtype)
    return Problem(*(x.to(device) for x in whole))


def topk_of(tokens: int, block: int, density: int) -> int:
    """Return how many blocks a query selects, its own one included, to see 1 / density of what dense shows it."""
    return max(round((tokens / block + 1) / 2 / density), 1)


def numbers(options: argparse.Namespace, device: torch.device) -> list[Row]:
    """Compare outputs with the reference at a short length."""
    rows = []
    for block in options.blocks:
        tokens = max(8 * block, 1024)
        one = problem(options, tokens, device)
        selection = selection_of(route(one, block_size=block, topk=3), block)
        ours = SelectedPass(one, selection, options.kernel)
        with torch.no_grad():
            ours.forward()
        positions = torch.arange(tokens, device=device)
        wide = [x.double() for x in one[:3]]
        truth, _ = selected_attention(*wide, selection=selection, k_positions=positions)
        error = float((ours.out.double() - truth).abs().max() / truth.abs().max())
        rows.append({"block": block, "tokens": tokens, "error": error, "dtype": str(one.q.dtype)})
    return rows


class Routing(Pass):
    """The choice alone; it has no backward."""

    def __init__(self, whole: Problem, block: int, topk: int) -> None:
        super().__init__(whole)
        self.arguments = whole, block, topk

    def forward(self) -> None:
        whole, block, topk = self.arguments
        with torch.no_grad():
            route(whole, block_size=block, topk=topk)

    def backward(self) -> None:
        pass


def speed(options: argparse.Namespace, device: torch.device) -> list[Row]:
    """Time dense and sparse attention, routing and layers; columns take turns."""
    whole, tokens = problem(options, options.tokens, device), options.tokens
    passes: dict[str, Steps] = {"dense": DensePass(whole), "dense layer": LayerPass(whole, kind="full")}
    rows: list[Row] = []
    for block in options.blocks:
        for density in options.densities:
            topk = topk_of(tokens, block, density)
            name = f"{block} x {topk}"
            if name in passes:
                continue
            chosen = route(whole, block_size=block, topk=topk)
            if device.type == "cuda":
                chosen = alike_in_blocks(chosen, block)
                passes[f"{name} flex"] = FlexPass(whole, chosen, block)
            selection = selection_of(chosen, block)
            passes[name] = SelectedPass(whole, selection, options.kernel)
            passes[f"{name} routing"] = Routing(whole, block, topk)
            passes[f"{name} layer"] = LayerPass(whole, kind="moba", block_size=block, topk=topk, kernel=options.kernel)
            seen = pairs_of(selection) / (tokens * (tokens + 1) / 2)
            rows.append({"block": block, "topk": topk, "asked": density, "density": seen})
    times = timed(passes, clock(device), warm_up=1, rounds=options.rounds)
    median = {
        column: [statistics.median(each[part] for each in taken) / 1e3 for part in (0, 1)]
        for column, taken in times.items()
    }
    for row in rows:
        name = f"{row['block']} x {row['topk']}"
        row["kernel"], row["layer"] = median[name], median[f"{name} layer"]
        row["routing"] = median[f"{name} routing"][0]
        row["dense"], row["dense_layer"] = median["dense"], median["dense layer"]
        row["times_as_fast"] = sum(median["dense"]) / sum(median[name])
        row["layer_times_as_fast"] = sum(median["dense layer"]) / sum(median[f"{name} layer"])
        if f"{name} flex" in median:
            row["flex"] = median[f"{name} flex"]
    return rows


def memory(options: argparse.Namespace) -> list[Row]:
    """Measure the peak of a pass at a quarter, a half and all of the length, at one density."""
    block, density = options.blocks[-1], options.densities[-1]
    rows = []
    topk = topk_of(options.tokens, block, density)
    for tokens in (options.tokens // 4, options.tokens // 2, options.tokens):
        whole = problem(options, tokens, torch.device("cpu"))
        selection = selection_of(route(whole, block_size=block, topk=topk), block)
        peak = peak_bytes(lambda: SelectedPass(whole, selection, options.kernel))  # noqa: B023
        routing = peak_bytes(lambda: Routing(whole, block, topk))  # noqa: B023
        rows.append({"tokens": tokens, "block": block, "topk": topk, "bytes": peak, "routing_bytes": routing})
    return rows


def speed_table(rows: list[Row], options: argparse.Namespace) -> str:
    """Format the times in seconds, forward and backward together."""
    first = rows[0]
    lines = [
        f"{options.tokens:,} tokens, {options.heads} heads ({options.kv_heads} KV) of {options.head_dim}, "
        f"{options.device}, {options.threads} thread(s), forward + backward in s: dense {sum(first['dense']):.3g}, "
        f"a dense layer {sum(first['dense_layer']):.3g}",
        f"{'block':>6}{'topk':>6}{'density':>9}{'kernel':>9}{'x dense':>9}{'of ideal':>10}{'routing':>9}{'layer':>8}"
        f"{'x dense':>9}" + (f"{'flex':>8}" if "flex" in first else ""),
    ]
    for row in rows:
        ideal = row["times_as_fast"] * row["density"]
        line = (
            f"{row['block']:6}{row['topk']:6}{'1/' + format(1 / row['density'], '.1f'):>9}{sum(row['kernel']):9.3g}"
            f"{row['times_as_fast']:8.1f}x{ideal:10.0%}{row['routing']:9.2g}{sum(row['layer']):8.3g}"
            f"{row['layer_times_as_fast']:8.1f}x"
        )
        lines.append(line + (f"{sum(row['flex']):8.3g}" if "flex" in row else ""))
    return "\n".join(lines)


def memory_table(rows: list[Row]) -> str:
    """Format peaks beyond the inputs."""
    if not rows:
        return ""
    lines = [f"{'tokens':>8}{'peak MB':>10}{'bytes per token':>17}{'routing MB':>12}"]
    for row in rows:
        peak, routing = row["bytes"], row["routing_bytes"] / 1e6
        lines.append(f"{row['tokens']:8}{peak / 1e6:10.1f}{peak / row['tokens']:17.0f}{routing:12.1f}")
    return "\n".join(lines)


def wrong(report: dict[str, Any]) -> list[str]:
    """Return in words what is not as it should be."""
    found = []
    for row in report["numbers"]:
        bound = EXACT if row["dtype"] == "torch.float32" else 3e-2
        if not row["error"] <= bound:
            found.append(f"blocks of {row['block']}: the output is off by {row['error']:.1e} of the largest")
    problem_of = report["problem"]
    if problem_of["tokens"] < ASKED_AT or problem_of["device"] != "cpu":
        return found
    for row in report["speed"]:
        least = LEAST.get(row["asked"])
        if least is not None and row["times_as_fast"] < least:
            found.append(
                f"blocks of {row['block']} at density 1/{row['asked']}: {row['times_as_fast']:.1f} times as fast as "
                f"dense, less than {least:g}"
            )
    first, last = report["memory"][0], report["memory"][-1]
    grown = last["bytes"] / last["tokens"] / (first["bytes"] / first["tokens"])
    if grown > FLAT:
        found.append(f"bytes per token grow {grown:.2f} times from {first['tokens']} to {last['tokens']} tokens")
    return found


def draw(report: dict[str, Any], path: Path) -> None:
    """Draw time over density, the kernel's and the layer's, with dense attention and the ideal."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 3.8), layout="constrained")
    for axes, what, dense in zip(figure.subplots(1, 2), ("kernel", "layer"), ("dense", "dense_layer"), strict=True):
        rows = report["speed"]
        whole = sum(rows[0][dense])
        axes.axhline(whole, color="black", lw=0.8, ls=":", label="dense")
        for index, block in enumerate(dict.fromkeys(row["block"] for row in rows)):
            mine = sorted((row for row in rows if row["block"] == block), key=lambda row: row["density"])
            axes.plot(
                [row["density"] for row in mine],
                [sum(row[what]) for row in mine],
                color=f"C{index}",
                marker="o",
                ms=4,
                label=f"blocks of {block}",
            )
        span = sorted(row["density"] for row in rows)
        if what == "kernel":
            axes.plot(span, [whole * each for each in span], color="grey", lw=0.8, label="dense x density")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("density: what is seen, of what dense attention shows")
        axes.set_title("attention alone" if what == "kernel" else "a whole layer, routing included", fontsize=10)
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=8)
    figure.axes[0].set_ylabel("seconds, forward + backward")
    figure.suptitle(f"MoBA on {report['problem']['tokens']:,} tokens, {report['problem']['device']}", fontsize=10)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
