"""What the benchmarks share: gloo ranks, one forward and backward pass, its time, the machine, the report's file."""

import argparse
import json
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from longctx.attention import ContextParallelAttention
from longctx.checkpoint.version import code_version
from longctx.kernels.mask import Mask
from longctx.parallel.layout import Layout
from longctx.parallel.plan import Plan
from longctx.parallel.registry import resolve_schedule
from longctx.parallel.transport import Alone

PARTS = ("out", "dq", "dk", "dv")
# Bounds on ||ours - local|| / ||local||: far above rounding, far below any token gone astray.
WRONG = {"float32": 1e-4, "bfloat16": 3e-2}


class Problem(NamedTuple):
    """q, dout `[1, T, H, D]`, k, v `[1, T, HK, D]`."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor

    def shard(self, layout: Layout, rank: int) -> "Problem":
        """Return a rank's tokens."""
        return Problem(*(layout.shard(x, rank=rank, dim=1) for x in self))


def make_problem(tokens: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> Problem:
    """Return random tensors of the whole sequence, equal on every rank."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, tokens, h, head_dim) for h in (heads, kv_heads, kv_heads, heads))
    return Problem(*(torch.randn(shape, generator=generator).to(dtype) for shape in shapes))


def start_ranks(function: Callable[[argparse.Namespace], object], ranks: int, options: argparse.Namespace) -> Any:
    """Run `function(options)` on gloo ranks of one thread each and return what rank 0 returns, through JSON."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_rank, args=(function, ranks, options, folder), nprocs=ranks, start_method="spawn")
        return json.loads(Path(folder, "result.json").read_text())


def _rank(
    rank: int, function: Callable[[argparse.Namespace], object], ranks: int, options: argparse.Namespace, folder: str
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
    result = function(options)
    if rank == 0:
        Path(folder, "result.json").write_text(json.dumps(result))
    dist.destroy_process_group()


class Pass:
    """One forward and backward pass; `forward` comes first and sets `out`, `backward` sets `grads` (dq, dk, dv)."""

    def __init__(self, shards: Problem) -> None:
        self.q, self.k, self.v = (x.detach().requires_grad_() for x in shards[:3])
        self.dout = shards.dout
        self.out: Tensor
        self.grads: tuple[Tensor, ...]

    def forward(self) -> None:
        raise NotImplementedError

    def backward(self) -> None:
        self.grads = torch.autograd.grad(self.out, (self.q, self.k, self.v), self.dout)


class OurPass(Pass):
    """Ours, through the library entry and autograd."""

    def __init__(self, attention: ContextParallelAttention, plan: Plan, shards: Problem) -> None:
        super().__init__(shards)
        self.attention, self.plan = attention, plan

    def forward(self) -> None:
        self.out = self.attention(self.q, self.k, self.v, plan=self.plan)


Make = Callable[[], Pass]


def local(whole: Problem, mask: Mask) -> Make:
    """Return what makes a pass of this rank alone over the whole sequence: the same kernel, no hop."""
    attention = ContextParallelAttention(
        layout=Layout("contiguous", 1), schedule=resolve_schedule("local"), transport=Alone(), kernel="torch"
    )
    plan = attention.plan([mask], total=whole.q.shape[1])
    return lambda: OurPass(attention, plan, whole)


def timed(make: Make | None) -> list[float]:
    """Return the slowest rank's forward and backward seconds; a rank given None only waits (collective)."""
    one = make() if make else None
    seconds = []
    for step in (one.forward, one.backward) if one else (None, None):
        dist.barrier()
        started = time.perf_counter()
        if step:
            step()
        slowest = torch.tensor(time.perf_counter() - started if step else 0.0, dtype=torch.float64)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        seconds.append(slowest.item())
    return seconds


def run(make: Make) -> Pass:
    """Do one pass."""
    one = make()
    one.forward()
    one.backward()
    return one


def peak_bytes(make: Make) -> int:
    """Return the most bytes of tensors that were alive at once in a pass, beyond those alive before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        one = run(make)
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    del one
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()  # negative where memory is freed
        peak = max(peak, now)
    return peak


def check(
    name: str, one: Pass, positions: Sequence[Tensor], truth: Pass, dtype: str, *, parts: Sequence[str] = PARTS
) -> None:
    """Refuse to time what is wrong: compare out and gradients of all ranks with one rank's (collective).

    Args:
        positions: every rank's positions.
        parts: what is compared.
    """
    order = torch.argsort(torch.cat(list(positions)))
    for what, ours, ref in zip(PARTS, (one.out, *one.grads), (truth.out, *truth.grads), strict=True):
        if what not in parts:
            continue
        mine = ours.detach().float().contiguous()
        shards = [torch.empty_like(mine) for _ in positions]
        dist.all_gather(shards, mine)
        whole, ref = torch.cat(shards, dim=1)[:, order], ref.detach().float()
        error = ((whole - ref).norm() / ref.norm()).item()
        if not error <= WRONG[dtype]:
            raise RuntimeError(f"{name} in {dtype}: {what} differs from the local result by {error:.1e}: not timed")


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def environment(*packages: str) -> dict[str, Any]:
    """Say what this was measured on, and with which versions; no names of machines or people."""
    cpu = subprocess.run(["lscpu"], capture_output=True, text=True, check=False).stdout
    model = next((line.split(":", 1)[1].strip() for line in cpu.splitlines() if line.startswith("Model name")), "")
    return {
        "cpu": model or platform.processor(),
        "cores": cores(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "longctx": code_version(),
        **{package: _version(package) for package in packages},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def write_report(path: Path, report: dict[str, Any]) -> None:
    """Write JSON, with the elements of top-level lists on a line each."""
    parts = []
    for key, value in report.items():
        if isinstance(value, list):
            text = "[\n" + ",\n".join(f"  {json.dumps(each)}" for each in value) + "\n ]"
        else:
            text = json.dumps(value)
        parts.append(f" {json.dumps(key)}: {text}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n")
