"""Softmax attention on a GPU: hops of all kinds, ours beside torch's backends, flex_attention and flash-attn.

    python benchmarks/softmax_gpu.py                  # bfloat16, 16 heads of 128; 8K to 128K tokens
    python benchmarks/softmax_gpu.py --kv-heads 4     # grouped
    python benchmarks/softmax_gpu.py --programs 1 2   # persistent grids of the Triton kernels too
    python benchmarks/softmax_gpu.py --cpu-smoke      # does the script run? tiny, on the CPU, in plain torch
    python benchmarks/to_readme.py benchmarks/results/softmax_gpu.json      # its table into README.md

Every column has the same tensors, takes its turn in every round, and is left out unless its first and last rows are
those of our float32 reference and its gradients those of the first column. TFLOP/s count visible pairs (4 D per pair
and head forward, 10 D backward), also those of columns that compute hidden ones; % is of a large matrix product's
speed, measured in the same run. The ring of four ranks is simulated on one device: its ranks compute one after the
other, so that ideal is dense causal attention of all tokens by the same kernel. JSON, with every round's times, and
PNG go to --out.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from _device import clock, surroundings, timed
from _ranks import WRONG, write_report
from _softmax_passes import OURS, Inputs, columns, make_inputs
from _softmax_problems import Problem, problems
from torch import Tensor

from longctx.attention import ContextParallelAttention
from longctx.kernels.mask import causal
from longctx.kernels.softmax.reference import dense_attention
from longctx.parallel.layout import Layout
from longctx.parallel.loopback import run_ranks
from longctx.parallel.registry import resolve_schedule
from longctx.parallel.transport import Transport

RING, CHECKED_ROWS = 4, 64


def main() -> None:
    """Measure, print the table, write JSON and PNG."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, help="default: as many as heads")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--programs", nargs="+", type=int, default=[], help="per multiprocessor: persistent grids")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--only", nargs="+", help="problems whose names contain one of these")
    parser.add_argument(
        "--cpu-smoke", action="store_true", help="tiny problems of fixed sizes on the CPU: does it run?"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/softmax_gpu.json"))
    options = parser.parse_args()
    if not options.cpu_smoke and not torch.cuda.is_available():
        raise SystemExit("no CUDA device is here; --cpu-smoke tries the script without one")
    found = problems(options.cpu_smoke)
    names = [*(problem.name for problem in found), "ring"]
    unknown = [part for part in options.only or () if not any(part in name for name in names)]
    if unknown:
        parser.error(f"--only {' '.join(unknown)}: known are {'; '.join(names)}")
    if any(count < 1 for count in options.programs):
        parser.error(f"--programs must be >= 1; given {options.programs}")
    if options.cpu_smoke:
        options.heads, options.kv_heads, options.head_dim, options.rounds, options.warm_up = 4, 2, 16, 2, 1
    options.kv_heads = options.kv_heads or options.heads
    device = torch.device("cpu" if options.cpu_smoke else "cuda")
    peak = matmul_flops(device, size=256 if options.cpu_smoke else 8192)
    print(f"{surroundings(device)['device']}: a matrix product runs at {peak / 1e12:.1f} TFLOP/s")
    rows, missing = [], []
    for problem in found:
        if options.only is None or any(part in problem.name for part in options.only):
            more, reasons = measure(problem, device, options, peak)
            rows += more
            missing += reasons
    if options.only is None or any(part in "ring" for part in options.only):
        rows += ring(device, options, peak)
    for reason in dict.fromkeys(missing):
        print(f"left out: {reason}")
    settings = {name: getattr(options, name) for name in ("heads", "kv_heads", "head_dim", "rounds", "warm_up")}
    settings["dtype"] = "float32" if options.cpu_smoke else "bfloat16"
    report = {"environment": surroundings(device, "flash-attn"), "settings": settings, "matmul_flops": peak}
    write_report(options.out, {**report, "rows": rows})
    draw(rows, options.out.with_suffix(".png"), report["environment"]["device"], peak)
    print(f"written to {options.out} and {options.out.with_suffix('.png')}")


def matmul_flops(device: torch.device, *, size: int) -> float:
    """Return the FLOP/s of a product of two square matrices, in the dtype that is measured."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    measured = clock(device)
    times = [measured((lambda: a @ b,))[0] for _ in range(20)]
    return 2 * size**3 / (1e-3 * statistics.median(times[5:]))


def measure(
    problem: Problem, device: torch.device, options: argparse.Namespace, peak: float
) -> tuple[list[dict[str, Any]], list[str]]:
    """Time every column on one problem, print a line for each, return what was found."""
    inputs = make_inputs(problem, options.heads, options.kv_heads, options.head_dim, device)
    passes, missing = columns(problem, inputs, programs=options.programs)
    truth, grads = first_and_last_rows(problem, inputs), None
    for name in list(passes):
        try:
            passes[name].forward()
            passes[name].backward()
            check(passes[name].out, truth)
            grads = grads or passes[name].grads  # of the first column: all have to agree
            for ours, theirs in zip(passes[name].grads, grads, strict=True):
                agree(ours, theirs.float(), str(ours.dtype))
        except Exception as error:  # also Triton's own, for too little shared memory
            missing.append(f"{name} on {problem.name}: {str(error).splitlines()[0]}")
            del passes[name]
            continue
        passes[name].grads = ()
    times = timed(passes, clock(device), warm_up=options.warm_up, rounds=options.rounds)
    pairs = problem.pairs * options.heads
    rows = []
    for name, seconds in times.items():
        row = {"problem": problem.name, "column": name, "pairs": pairs, "head_dim": options.head_dim}
        row |= {"forward": [s[0] for s in seconds], "backward": [s[1] for s in seconds]}
        if name == "auto":
            row["by"] = passes[name].kernel.serving(passes[name].work)
        rows.append(row)
        print(line(row, peak), flush=True)
    return rows, missing


def first_and_last_rows(problem: Problem, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Return which rows, and what dense attention in float32 makes of them."""
    q, k, v, _ = inputs
    count = min(CHECKED_ROWS, problem.tokens // 2)
    rows = torch.cat((torch.arange(count), torch.arange(problem.tokens - count, problem.tokens)))
    q_at, k_at = (problem.layout.positions(rank, problem.total) for rank in problem.ranks)
    seen = problem.mask.allowed(q_at[rows], k_at).to(q.device)
    outs = []
    for head in range(q.shape[2]):
        kv = head * k.shape[2] // q.shape[2]
        parts = (x[:, :, h : h + 1].float() for x, h in ((q[:, rows], head), (k, kv), (v, kv)))
        outs.append(dense_attention(*parts, allowed=seen)[0])
    return rows, torch.cat(outs, dim=2)


def check(out: Tensor, truth: tuple[Tensor, Tensor]) -> None:
    """Refuse to time what is wrong."""
    rows, want = truth
    agree(out[:, rows], want, str(out.dtype))


def agree(ours: Tensor, want: Tensor, dtype: str) -> None:
    """Raise RuntimeError where a result is not the other one."""
    error = ((ours.float() - want).norm() / want.norm()).item()
    if not error <= WRONG[dtype.split(".")[1]]:
        raise RuntimeError(f"off by {error:.1e}: not timed")


class RingPass:
    """A striped ring of simulated ranks on one device."""

    def __init__(self, ranks: int, kernel: str, inputs: Inputs) -> None:
        self.layout, self.kernel, self.ranks = Layout("striped", ranks), kernel, ranks
        self.schedule = resolve_schedule("ring" if ranks > 1 else "local")
        self.shards = [[self.layout.shard(x, rank=rank, dim=1) for x in inputs] for rank in range(ranks)]
        self.total = inputs[0].shape[1]

    def forward(self) -> None:
        """Do all of it: a rank's backward pass needs its own forward pass."""
        run_ranks(self.ranks, self._rank)

    def backward(self) -> None:
        """Do nothing."""

    def _rank(self, transport: Transport) -> None:
        *leaves, dout = self.shards[transport.rank]
        attention = ContextParallelAttention(
            layout=self.layout, schedule=self.schedule, transport=transport, kernel=self.kernel
        )
        q, k, v = (x.detach().requires_grad_() for x in leaves)
        out = attention(q, k, v, plan=attention.plan([causal()], total=self.total))
        torch.autograd.grad(out, (q, k, v), dout)


def ring(device: torch.device, options: argparse.Namespace, peak: float) -> list[dict[str, Any]]:
    """Time a ring of simulated ranks beside one rank with all tokens, for each of our kernels that is there."""
    tokens = 256 if device.type == "cpu" else 128 * 1024
    problem = Problem("ring", tokens, Layout("contiguous", 1))
    inputs = make_inputs(problem, options.heads, options.kv_heads, options.head_dim, device)
    rows = []
    for kernel in OURS:
        passes = {"alone": RingPass(1, kernel, inputs), "ring": RingPass(RING, kernel, inputs)}
        try:
            times = timed(passes, clock(device), warm_up=options.warm_up, rounds=options.rounds)
        except ValueError:
            continue  # said before
        alone, together = (statistics.median(t[0] for t in times[name]) for name in passes)
        name = f"ring of {RING} simulated ranks, {tokens // 1024}K" if tokens >= 1024 else f"ring of {RING}, {tokens}"
        row = {"problem": name, "column": kernel, "pairs": problem.pairs * options.heads, "head_dim": options.head_dim}
        row |= {"forward": [t[0] for t in times["ring"]], "backward": [0.0] * options.rounds}
        rows.append(row | {"of_ideal": alone / together})
        print(f"{line(rows[-1], peak)}   {100 * alone / together:.0f} % of ideal", flush=True)
    return rows


def speed(row: dict[str, Any], part: str) -> float:
    """Return FLOP/s of `forward`, `backward` or `both`, from medians."""
    seconds = {"both": [f + b for f, b in zip(row["forward"], row["backward"], strict=True)]}.get(part) or row[part]
    per_pair = {"forward": 4, "backward": 10, "both": 14}[part] * row["head_dim"]
    return float(row["pairs"] * per_pair / (1e-3 * statistics.median(seconds)))


def line(row: dict[str, Any], peak: float) -> str:
    """Return a row of the table."""
    forward, backward = (statistics.median(row[part]) for part in ("forward", "backward"))
    parts = [f"{row['problem']:36} {row['column']:20} {forward:9.2f} + {backward:9.2f} ms"]
    for part in ("forward", "backward", "both"):
        if backward or part == "both":
            parts.append(f"{part} {speed(row, part) / 1e12:6.1f} ({100 * speed(row, part) / peak:3.0f} %)")
    return "  ".join(parts) + (f"  by {row['by']}" if "by" in row else "")


def draw(rows: list[dict[str, Any]], path: Path, device: str, peak: float) -> None:
    """Draw TFLOP/s of forward and backward together: bars for each problem, a colour for each column."""
    from matplotlib.figure import Figure

    names, kinds = (list(dict.fromkeys(row[key] for row in rows)) for key in ("problem", "column"))
    figure = Figure(figsize=(max(8, 1.5 * len(names)), 5), layout="constrained")
    axes = figure.subplots()
    width = 0.85 / max(len(kinds), 1)
    for place, kind in enumerate(kinds):
        mine = [row for row in rows if row["column"] == kind]
        at = [names.index(row["problem"]) + (place - (len(kinds) - 1) / 2) * width for row in mine]
        axes.bar(at, [speed(row, "both") / 1e12 for row in mine], width=width, label=kind)
    axes.axhline(peak / 1e12, color="black", lw=0.8, ls=":", label="matrix product")
    axes.set_xticks(range(len(names)), [name.replace(", ", "\n") for name in names], fontsize=7)
    axes.set_ylabel("TFLOP/s of visible pairs, forward + backward")
    axes.legend(fontsize=7, ncols=2)
    figure.suptitle(device)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
