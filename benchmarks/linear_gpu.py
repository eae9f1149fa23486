"""Linear attention on a GPU: forward and backward of every kind, ours and flash-linear-attention's side by side.

    python benchmarks/linear_gpu.py                # bfloat16; B1 T8192 H96 D128, B2 T16384 H16 D128, 8K to 128K tokens
    python benchmarks/linear_gpu.py --cpu-smoke    # does the script run? tiny, on the CPU, in plain torch
    python benchmarks/linear_gpu.py --help

Both go through the library's entry, `kernel=auto` and `kernel=fla`, with the same tensors, in turn in every round, and
are compared before they are timed. Times are medians of CUDA events after a warm-up; a ratio above 1 is in our favour.
flash-linear-attention is left out, and said so, where it is not installed (`pip install 'longctx[fla]'`). JSON, with
every round's times, and PNG go to --out.
"""

import argparse
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from _device import clock, surroundings, timed
from _linear_passes import KINDS, Inputs, LinearPass, alone, make_inputs
from _ranks import WRONG, write_report

from longctx.kernels.linear.fla_kernel import FlaKernel
from longctx.kernels.linear.op import linear_request, resolve_kernel

PEER = "flash-linear-attention"
SWEEP = "sweep"


def main() -> None:
    """Measure, print the table, write JSON and PNG."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--warm-up", type=int, default=5)
    parser.add_argument("--cpu-smoke", action="store_true", help="64 and 128 tokens on the CPU: does it run?")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/linear_gpu.json"))
    options = parser.parse_args()
    if not options.cpu_smoke and not torch.cuda.is_available():
        raise SystemExit("no CUDA device is here; --cpu-smoke tries the script without one")
    device = torch.device("cpu" if options.cpu_smoke else "cuda")
    rows = [
        row
        for name, shape in problems(options.cpu_smoke)
        for kind in options.kinds
        for row in [measure(name, kind, shape, device, options)]
        if row is not None
    ]
    for reason in sorted({row["no fla"] for row in rows if row["no fla"]}):
        print(f"left out: {reason}")
    report = {"environment": surroundings(device, PEER), "rounds": options.rounds, "rows": rows}
    write_report(options.out, report)
    draw(rows, options.out.with_suffix(".png"), report["environment"]["device"])
    print(f"written to {options.out} and {options.out.with_suffix('.png')}")


def problems(smoke: bool) -> list[tuple[str, tuple[int, int, int, int]]]:
    """Return (name, (B, T, H, D)); those of the sweep share everything but T."""
    if smoke:
        return [("B1 T64 H2 D16", (1, 64, 2, 16)), *((SWEEP, (1, tokens, 1, 16)) for tokens in (64, 128))]
    fixed = [(1, 8192, 96, 128), (2, 16384, 16, 128)]
    named = [("B{} T{} H{} D{}".format(*shape), shape) for shape in fixed]
    return named + [(SWEEP, (1, 1024 * thousands, 16, 128)) for thousands in (8, 16, 32, 64, 128)]


def measure(
    name: str, kind: str, shape: tuple[int, int, int, int], device: torch.device, options: argparse.Namespace
) -> dict[str, Any] | None:
    """Time both on one problem, print a line, return what was found."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    inputs = on_device(kind, shape, dtype, device)
    request = linear_request(inputs.q, inputs.k, inputs.v, g=inputs.g, beta=inputs.beta, chunk_size=None)
    row: dict[str, Any] = {"problem": name, "kind": kind, "shape": list(shape), "dtype": str(dtype).split(".")[1]}
    row["kernel"] = resolve_kernel("auto", request).name
    columns = {"ours": alone("auto")}
    row["no fla"] = FlaKernel().unsupported(request)
    if row["no fla"] is None:
        columns["fla"] = alone("fla")
    try:
        passes = {column: LinearPass(op, inputs) for column, op in columns.items()}
        compare(kind, passes, row["dtype"])
        times = timed(passes, clock(device), warm_up=options.warm_up, rounds=options.rounds)
    except torch.OutOfMemoryError:
        print(f"{kind:11} {label(shape):22} does not fit into this device's memory")
        return None
    for column, seconds in times.items():
        row[column] = {"forward": [s[0] for s in seconds], "backward": [s[1] for s in seconds]}
    print(line(row), flush=True)
    return row


def on_device(kind: str, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> Inputs:
    """Return the problem's tensors; decays stay float32."""
    batch, tokens, heads, size = shape
    drawn = make_inputs(kind, batch * tokens, heads, size)

    def place(x: torch.Tensor | None, dtype: torch.dtype) -> Any:
        if x is None or x.dim() == 1:
            return x if x is None else x.to(device)
        return x.reshape(batch, tokens, *x.shape[2:]).to(device, dtype)

    names = ("q", "k", "v", "dout", "beta")
    moved = {each: place(getattr(drawn, each), dtype) for each in names}
    return replace(drawn, **moved, g=place(drawn.g, torch.float32))


def compare(kind: str, passes: dict[str, LinearPass], dtype: str) -> None:
    """Refuse to time two that differ."""
    for one in passes.values():
        one.forward()
        one.backward()
    if "fla" not in passes:
        return
    ours, theirs = passes["ours"], passes["fla"]
    for a, b in zip((ours.out, *ours.grads), (theirs.out, *theirs.grads), strict=True):
        error = ((a.float() - b.float()).norm() / b.float().norm()).item()
        if not error <= WRONG[dtype]:
            raise RuntimeError(f"{kind}: ours and {PEER}'s differ by {error:.1e}: not timed")


def label(shape: list[int] | tuple[int, ...]) -> str:
    """Name a shape."""
    return "B{} T{} H{} D{}".format(*shape)


def total(row: dict[str, Any], column: str) -> float:
    """Return the median of forward and backward together, milliseconds."""
    return statistics.median(f + b for f, b in zip(row[column]["forward"], row[column]["backward"], strict=True))


def line(row: dict[str, Any]) -> str:
    """Return a row of the table."""
    parts = [f"{row['kind']:11} {label(row['shape']):22} ours ({row['kernel']})"]
    for column in ("ours", "fla"):
        if column in row:
            forward, backward = (statistics.median(row[column][part]) for part in ("forward", "backward"))
            name = "" if column == "ours" else "fla"
            parts.append(f"{name:4}{forward:8.2f} + {backward:8.2f} = {total(row, column):8.2f} ms")
    if "fla" in row:
        parts.append(f"ratio {total(row, 'fla') / total(row, 'ours'):.2f}")
    return "  ".join(parts)


def draw(rows: list[dict[str, Any]], path: Path, device: str) -> None:
    """Draw milliseconds of the fixed problems as bars, tokens per second of the sweep as lines."""
    from matplotlib.figure import Figure

    fixed = [row for row in rows if row["problem"] != SWEEP]
    figure = Figure(figsize=(14, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    columns = [column for column in ("ours", "fla") if any(column in row for row in rows)]
    for offset, column in enumerate(columns):
        places = [place + 0.4 * offset for place, row in enumerate(fixed) if column in row]
        heights = [total(row, column) for row in fixed if column in row]
        left.bar(places, heights, width=0.4, label=column if column == "ours" else PEER)
    left.set_xticks(
        range(len(fixed)), [f"{row['kind']}\n{label(row['shape'])}" for row in fixed], fontsize=6, rotation=60
    )
    left.set_ylabel("forward + backward, ms")
    left.legend()
    for color, kind in enumerate(KINDS):
        for column, style in zip(columns, ("-o", "--x"), strict=False):
            sweep = [row for row in rows if (row["problem"], row["kind"]) == (SWEEP, kind) and column in row]
            tokens = [row["shape"][0] * row["shape"][1] for row in sweep]
            speed = [1e3 * count / total(row, column) for count, row in zip(tokens, sweep, strict=True)]
            if sweep:
                right.plot(tokens, speed, style, color=f"C{color}", label=kind if column == "ours" else None)
    right.set_xscale("log", base=2)
    right.set_ylim(bottom=0)
    right.set_xlabel(f"tokens (dashed: {PEER})")
    right.set_ylabel("tokens/s, forward + backward of one layer")
    right.legend(fontsize=7)
    figure.suptitle(device)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
