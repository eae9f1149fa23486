"""How rounding error grows with the number of context-parallel ranks, for every schedule: figure, table, JSON.

    python benchmarks/error_vs_cp.py               # bfloat16, cp 1 to 64; exit status 1 if a schedule is not flat
    python benchmarks/error_vs_cp.py --dtype float32   # a table only: nothing but sums rounds there, and they grow

Causal attention, striped layout, simulated ranks (`parallel/loopback.py`). The error of out, dq, dk and dv is
||ours - truth|| / ||truth||, the truth being dense attention in float64 from the same rounded inputs. Kernels:

torch       what `auto` takes.
reference   dense tiles in float32: what is left is what schedules add by rounding what travels and what is merged.
aten        bfloat16 only, for comparison: ATen's flash attention, which `torch` does not use there. It rounds each
            rectangle's results to bfloat16, and inside one call its backward adds dk and dv of one block of rows after
            the other in bfloat16. So its error depends on how many blocks a call has (of 32 rows, from 192 rows on of
            64, from 768 on of 256), which changes with cp and not in one direction.

Asserted in bfloat16 for every schedule with `torch` and `reference`: from cp=2 to 64 the largest error is at most 1.1
times the smallest.
"""

import argparse
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from _ranks import PARTS, Problem, environment, make_problem, write_report
from torch import Tensor

from longctx.attention import ContextParallelAttention
from longctx.kernels.contract import Request
from longctx.kernels.mask import causal
from longctx.kernels.softmax.aten import CpuFlash
from longctx.kernels.softmax.reference import dense_attention
from longctx.parallel.layout import Layout
from longctx.parallel.loopback import LoopbackTransport, run_ranks
from longctx.parallel.schedule import Schedule
from longctx.parallel.schedules.all_gather import AllGather
from longctx.parallel.schedules.ring import DoubleRing, Ring, Ulysses, Usp

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 64
KERNELS = {"torch": "-", "reference": ":", "aten": "--"}
ASSERTED = ("torch", "reference")
FLAT = 1.1
SCHEDULES: dict[str, Callable[[int], Schedule]] = {
    "ring": lambda cp: Ring(backward_moves="rotate_kv"),
    "ring, q back (burst)": lambda cp: Ring(backward_moves="rotate_q"),
    "double_ring": lambda cp: DoubleRing(
        backward_moves="rotate_kv", ranks_per_ring=min(cp, 8) if cp > 8 else -(-cp // 2)
    ),
    "all_gather": lambda cp: AllGather(),
    "ulysses": lambda cp: Ulysses(),  # to cp=4, one query head per rank
    "usp": lambda cp: Usp(backward_moves="rotate_kv", ulysses=min(cp, 2 if cp < 8 else 4)),
}


def main() -> None:
    """Measure, print the table, write JSON and PNG, and say whether the errors are flat."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--cp", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/error_vs_cp.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    machine = environment()
    del machine["cores"]  # nothing is timed
    inputs = make_problem(options.tokens, HEADS, KV_HEADS, HEAD_DIM, getattr(torch, options.dtype))
    truth = dense(inputs)
    print(
        f"{options.tokens:,} tokens, {options.dtype}, H={HEADS} HK={KV_HEADS} D={HEAD_DIM}, causal, striped; "
        f"relative error against float64\n\n{'kernel':10} {'schedule':21} {'cp':>3} "
        + " ".join(f"{n:>9}" for n in PARTS)
    )
    rows = []
    for kernel in KERNELS if options.dtype == "bfloat16" else ASSERTED:
        for name, schedule in SCHEDULES.items():
            for cp in options.cp:
                if name == "ulysses" and HEADS % cp:
                    continue
                found = errors(sharded(inputs, cp, schedule(cp), kernel), truth)
                rows.append({"kernel": kernel, "schedule": name, "cp": cp, **found})
                print(f"{kernel:10} {name:21} {cp:3} " + " ".join(f"{found[n]:9.2e}" for n in PARTS), flush=True)
    found = spread(rows)
    print("\n" + verdicts(found, asserted=options.dtype == "bfloat16"))
    problem = {"tokens": options.tokens, "heads": [HEADS, KV_HEADS], "head_dim": HEAD_DIM, "dtype": options.dtype}
    problem |= {"mask": "causal", "layout": "striped"}
    write_report(options.out, {"environment": machine, "problem": problem, "rows": rows, "flatness": found})
    draw(rows, problem, options.out.with_suffix(".png"))
    print(f"written to {options.out} and {options.out.with_suffix('.png')}")
    sys.exit(options.dtype == "bfloat16" and not all(each["flat"] for each in found if each["kernel"] in ASSERTED))


def dense(inputs: Problem) -> list[Tensor]:
    """Return out, dq, dk, dv in float64 from the rounded inputs, KV head by KV head."""
    group, positions = HEADS // KV_HEADS, torch.arange(inputs.q.shape[1])
    allowed = causal().allowed(positions, positions)
    parts = []
    for head in range(KV_HEADS):
        own = slice(head * group, (head + 1) * group)
        q = inputs.q[:, :, own].double().requires_grad_()
        k, v = (x[:, :, head : head + 1].double().requires_grad_() for x in (inputs.k, inputs.v))
        out, _ = dense_attention(q, k, v, allowed=allowed)
        parts.append([out.detach(), *torch.autograd.grad(out, (q, k, v), inputs.dout[:, :, own].double())])
    return [torch.cat(each, dim=2) for each in zip(*parts, strict=True)]


def sharded(inputs: Problem, cp: int, schedule: Schedule, kernel: str) -> list[Tensor]:
    """Return the same from `cp` simulated ranks."""
    layout = Layout("striped", cp)

    def rank(transport: LoopbackTransport) -> list[Tensor]:
        name = "torch" if kernel == "aten" else kernel
        attention = ContextParallelAttention(layout=layout, schedule=schedule, transport=transport, kernel=name)
        shard = inputs.shard(layout, transport.rank)
        q, k, v = (x.requires_grad_() for x in shard[:3])
        out = attention(q, k, v, plan=attention.plan([causal()], total=inputs.q.shape[1]))
        return [out.detach(), *torch.autograd.grad(out, (q, k, v), shard.dout)]

    with patch("longctx.kernels.softmax.op.choose_primitive", _aten) if kernel == "aten" else nullcontext():
        ranks = run_ranks(cp, rank)
    return [layout.unshard([shards[i] for shards in ranks], dim=1) for i in range(len(PARTS))]


def _aten(request: Request) -> CpuFlash:
    return CpuFlash()


def errors(got: list[Tensor], truth: list[Tensor]) -> dict[str, float]:
    """Return the relative error of each part."""
    return {
        name: ((ours.double() - ref).norm() / ref.norm()).item()
        for name, ours, ref in zip(PARTS, got, truth, strict=True)
    }


def spread(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return for each kernel and schedule how far errors from cp=2 on are apart: largest / smallest of each part."""
    found = []
    for kernel, name in dict.fromkeys((row["kernel"], row["schedule"]) for row in rows):
        mine = [row for row in rows if (row["kernel"], row["schedule"]) == (kernel, name) and row["cp"] >= 2]
        apart = {part: max(row[part] for row in mine) / min(row[part] for row in mine) for part in PARTS}
        found.append({"kernel": kernel, "schedule": name, **apart, "flat": max(apart.values()) <= FLAT})
    return found


def verdicts(found: list[dict[str, Any]], *, asserted: bool) -> str:
    """Say how flat each kernel and schedule is."""
    lines = [f"{'largest / smallest from cp=2 on':36} " + " ".join(f"{part:>9}" for part in PARTS)]
    for each in found:
        failed = "FAILED: " if asserted and each["kernel"] in ASSERTED and not each["flat"] else ""
        lines.append(
            f"{each['kernel']:10} {each['schedule']:25} "
            + " ".join(f"{each[part]:9.3f}" for part in PARTS)
            + f"   {failed}{'flat' if each['flat'] else 'not flat'}"
        )
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], problem: dict[str, Any], path: Path) -> None:
    """Draw a panel per part: error against cp, a line per schedule and kernel."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 3.9), layout="constrained")
    panels = figure.subplots(1, len(PARTS), sharey=True)
    for axes, part in zip(panels, PARTS, strict=True):
        for kernel, style in KERNELS.items():
            for index, name in enumerate(SCHEDULES):
                mine = [row for row in rows if (row["kernel"], row["schedule"]) == (kernel, name)]
                if not mine:
                    continue
                x, y = [row["cp"] for row in mine], [row[part] for row in mine]
                # Most lines coincide: the later ones are thinner and their markers smaller.
                size = {"lw": 3.2 - 0.45 * index, "ms": 9 - 1.2 * index, "marker": "osD^vX"[index]}
                axes.plot(x, y, style, color=f"C{index}", label=f"{name} ({kernel})", **size)
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted({row["cp"] for row in rows}), sorted({row["cp"] for row in rows}))
        axes.set_xlabel("cp")
        axes.set_title(part)
        axes.grid(alpha=0.3)
    panels[0].set_ylim(bottom=0)
    panels[0].set_ylabel("relative error against float64")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", fontsize=6)
    figure.suptitle(
        f"Rounding error over context-parallel ranks: {problem['dtype']}, {problem['tokens']:,} tokens, causal, "
        "striped. Solid: torch kernel, dotted: reference, dashed: ATen's flash attention",
        fontsize=10,
    )
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
