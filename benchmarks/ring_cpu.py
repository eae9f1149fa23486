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
import json
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from longctx.attention import ContextParallelAttention
from longctx.checkpoint.version import code_version
from longctx.kernels.mask import causal
from longctx.kernels.merge import empty_partial
from longctx.kernels.softmax.aten import CpuFlash
from longctx.kernels.softmax.torch_kernel import TorchKernel
from longctx.parallel.layout import Layout
from longctx.parallel.plan import balance, plan
from longctx.parallel.registry import resolve_schedule
from longctx.parallel.transport import ProcessGroupTransport

LAYOUTS = ("contiguous", "zigzag", "striped")
PEER = "ring-attention-pytorch"
PEER_BUCKET = 1024  # its default
Problem = tuple[Tensor, Tensor, Tensor, Tensor]


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
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/ring_cpu.json"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(
            measure,
            args=(options, f"{folder}/rendezvous", f"{folder}/out.json"),
            nprocs=options.ranks,
            start_method="spawn",
        )
        seconds = json.loads(Path(folder, "out.json").read_text())
    report = {"environment": environment(), "problem": {**vars(options), "out": None}, "rows": rows(options, seconds)}
    print(table(options, report["rows"]))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1, default=str) + "\n")
    draw(report["rows"], options.out.with_suffix(".png"), options)
    print(f"written to {options.out} and {options.out.with_suffix('.png')}")


def measure(rank: int, options: argparse.Namespace, rendezvous: str, out: str) -> None:
    """Time every column on one rank; rank 0 writes {dtype: {column: [[forward, backward] per round]}}."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=options.ranks)
    assert dist.group.WORLD is not None
    results: dict[str, dict[str, list[list[float]]]] = {}
    for dtype in options.dtypes:
        columns = build_columns(options, getattr(torch, dtype), dist.group.WORLD)
        check_columns(columns, dtype)
        times: dict[str, list[list[float]]] = {name: [] for name in columns}
        for _ in range(options.rounds):
            for name, (_, run) in columns.items():
                times[name].append(timed(run))
        results[dtype] = times
    if rank == 0:
        Path(out).write_text(json.dumps(results))
    dist.destroy_process_group()


def build_columns(
    options: argparse.Namespace, dtype: torch.dtype, group: dist.ProcessGroup
) -> dict[str, tuple[list[Tensor], Callable[[], "Pass"]]]:
    """Return what is measured: every rank's positions, and a function that prepares a forward and backward pass."""
    whole = make_problem(options, dtype)
    columns: dict[str, tuple[list[Tensor], Callable[[], Pass]]] = {}
    columns["local"] = ([torch.arange(options.tokens)], lambda: LocalPass(whole))
    for name in LAYOUTS:
        layout = Layout(name, options.ranks)  # type: ignore[arg-type]
        transport = ProcessGroupTransport(group)
        attention = ContextParallelAttention(
            layout=layout, schedule=resolve_schedule("ring"), transport=transport, kernel="torch"
        )
        shards = tuple(layout.shard(x, rank=transport.rank, dim=1) for x in whole)
        positions = [layout.positions(rank, options.tokens) for rank in range(options.ranks)]
        columns[name] = (positions, lambda attention=attention, shards=shards: RingPass(attention, shards))
    # The peer's CPU path multiplies float32 with the input dtype, so it runs in float32 only.
    peer_runs = dtype == torch.float32 and options.heads == options.kv_heads and not options.no_peer
    if find_spec("ring_attention_pytorch") and peer_runs:
        # It stripes so that each bucket of consecutive local tokens is spread over the whole sequence.
        positions = list(torch.arange(options.tokens).view(PEER_BUCKET, -1).t().flatten().chunk(options.ranks))
        shards = tuple(x[:, positions[dist.get_rank()]] for x in whole)
        columns[PEER] = (positions, lambda: PeerPass(shards, options))
    return columns


def make_problem(options: argparse.Namespace, dtype: torch.dtype) -> Problem:
    """Return q, k, v, dout of the whole sequence, equal on every rank."""
    generator = torch.Generator().manual_seed(0)
    heads = (options.heads, options.kv_heads, options.kv_heads, options.heads)
    q, k, v, dout = (torch.randn(1, options.tokens, h, options.head_dim, generator=generator) for h in heads)
    return q.to(dtype), k.to(dtype), v.to(dtype), dout.to(dtype)


class Pass:
    """One forward and backward pass; `forward` comes first."""

    out: Tensor

    def forward(self) -> None:
        raise NotImplementedError

    def backward(self) -> None:
        raise NotImplementedError


class RingPass(Pass):
    """Ours, through the library entry and autograd."""

    def __init__(self, attention: ContextParallelAttention, shards: tuple[Tensor, ...]) -> None:
        self.q, self.k, self.v = (x.detach().requires_grad_() for x in shards[:3])
        self.dout, self.attention = shards[3], attention
        self.plans = attention.plans([causal()], total=self.q.shape[1] * attention.transport.size)

    def forward(self) -> None:
        self.out, _ = self.attention(self.q, self.k, self.v, plans=self.plans)

    def backward(self) -> None:
        torch.autograd.grad(self.out, (self.q, self.k, self.v), self.dout)


class LocalPass(Pass):
    """The same kernel on the whole sequence: one call, no hop, no merge beyond the first."""

    def __init__(self, whole: Problem) -> None:
        self.q, self.k, self.v, self.dout = whole
        self.kernel, self.scale = TorchKernel(CpuFlash()), whole[0].shape[-1] ** -0.5
        one = plan(Layout("contiguous", 1), causal(), resolve_schedule("local"), rank=0, total=self.q.shape[1])
        self.tiles = one.hops[0].tiles

    def forward(self) -> None:
        self.partial = empty_partial(self.q, v_head_dim=self.v.shape[-1])
        self.kernel.forward(self.q, self.k, self.v, tiles=self.tiles, softmax_scale=self.scale, partial=self.partial)
        self.out = self.partial.out.to(self.q.dtype)

    def backward(self) -> None:
        dq, dk, dv = (torch.zeros(x.shape) for x in (self.q, self.k, self.v))
        self.kernel.backward(
            self.q,
            self.k,
            self.v,
            tiles=self.tiles,
            softmax_scale=self.scale,
            dout=self.dout,
            out=self.out,
            lse=self.partial.lse,
            dq=dq,
            dk=dk,
            dv=dv,
        )


class PeerPass(Pass):
    """ring-attention-pytorch's striped ring on the same shards."""

    def __init__(self, shards: tuple[Tensor, ...], options: argparse.Namespace) -> None:
        from ring_attention_pytorch.ring_flash_attention import ring_flash_attn

        self.q, self.k, self.v = (x.detach().requires_grad_() for x in shards[:3])
        self.dout, self.attend, self.ranks = shards[3], ring_flash_attn, options.ranks

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

    def backward(self) -> None:
        torch.autograd.grad(self.out, (self.q, self.k, self.v), self.dout)


def check_columns(columns: dict[str, tuple[list[Tensor], Callable[[], Pass]]], dtype: str) -> None:
    """Warm every column up and refuse to time one whose result is wrong."""
    reference: Tensor | None = None
    for name, (positions, make) in columns.items():
        one = make()
        one.forward()
        one.backward()
        whole = one.out.detach().float()
        if len(positions) > 1:
            shards = [torch.empty_like(whole) for _ in positions]
            dist.all_gather(shards, whole.contiguous())
            whole = torch.cat(shards, dim=1)[:, torch.argsort(torch.cat(positions))]
        reference = whole if reference is None else reference
        error = (whole - reference).abs().max().item()
        if error > (1e-4 if dtype == "float32" else 3e-2):
            raise RuntimeError(f"{name} in {dtype} differs from the local result by {error:.2e}: not timed")


def timed(make: Callable[[], Pass]) -> list[float]:
    """Return the slowest rank's forward and backward seconds."""
    one = make()
    seconds = []
    for step in (one.forward, one.backward):
        dist.barrier()
        started = time.perf_counter()
        step()
        slowest = torch.tensor(time.perf_counter() - started, dtype=torch.float64)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        seconds.append(slowest.item())
    return seconds


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
                theory = balance(layout, causal(), resolve_schedule("ring"), total=options.tokens).efficiency
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


def environment() -> dict[str, Any]:
    """Say what this was measured on."""
    try:
        peer = version(PEER)
    except PackageNotFoundError:
        peer = None
    cpu = subprocess.run(["lscpu"], capture_output=True, text=True, check=False).stdout
    model = next((line.split(":", 1)[1].strip() for line in cpu.splitlines() if line.startswith("Model name")), "")
    return {
        "cpu": model or platform.processor(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "longctx": code_version(),
        PEER: peer,
    }


if __name__ == "__main__":
    main()
