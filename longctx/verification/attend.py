"""Run the composition on all ranks of a bench, put the shards together, and count what was sent; dense beside it."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longctx.kernels.contract import Request
from longctx.kernels.mask import HeadMasks, Mask
from longctx.kernels.softmax.op import resolve_kernel
from longctx.kernels.softmax.reference import dense_attention
from longctx.parallel.cost import traffic
from longctx.parallel.heads import HeadSplit
from longctx.parallel.plan import plan
from longctx.parallel.schedule import Sent
from longctx.parallel.transport import Traffic, Transport
from longctx.verification.bench import Bench
from longctx.verification.check_data import attention_of, kernel_for
from longctx.verification.small import Small

NAMES = ("out", "lse", "dq", "dk", "dv", "d(sink logits)")


@dataclass(frozen=True)
class Problem:
    """Whole tensors on the CPU: `q, dout [B, T, H, D]`, `k, v [B, T, HK, D]`, `sink [H]` or None."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    sink: Tensor | None

    def to(self, dtype: torch.dtype) -> "Problem":
        """Return it in another dtype; sink logits are parameters, which stay float32 or better."""
        q, k, v, dout = (x.to(dtype) for x in (self.q, self.k, self.v, self.dout))
        return Problem(q, k, v, dout, self.sink)


@dataclass(frozen=True)
class Counted:
    """What one rank sent in a pass, and what the plan says that it would."""

    hops: int
    bytes_to: dict[int, int]
    planned_hops: int
    planned_bytes_to: dict[int, int]

    @property
    def as_planned(self) -> bool:
        return self.hops == self.planned_hops and self.bytes_to == self.planned_bytes_to


@dataclass(frozen=True)
class Outcome:
    """Whole tensors by name (`NAMES`, those asked for), and each rank's counts: `[forward, backward]`."""

    tensors: dict[str, Tensor]
    sent: list[list[Counted]]


def make_problem(small: Small, *, batch: int, head_dim: int, seed: int) -> Problem:
    """Return random float64 tensors, the same on every rank."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    heads, kv_heads = small.model.num_heads, small.model.num_kv_heads
    q, dout = (normal(batch, small.total, heads, head_dim) for _ in range(2))
    k, v = (normal(batch, small.total, kv_heads, head_dim) for _ in range(2))
    return Problem(q, k, v, dout, normal(heads).float().double() if small.model.sink_logits else None)


def attend(
    small: Small,
    bench: Bench,
    problem: Problem,
    masks: Sequence[Mask | HeadMasks],
    *,
    wants_lse: bool = False,
    backward: bool = True,
) -> Outcome:
    """Return what the ranks compute together (collective on real ranks).

    Args:
        wants_lse: ask for lse too. Training does not, and Ulysses sends it along: nothing is compared with the plan.
        backward: compute gradients.
    """
    layout, model = small.layout, small.model

    def work(transport: Transport) -> tuple[list[Tensor], list[Counted]]:
        attention = attention_of(small, transport, problem.q.dtype)
        plan = attention.plan(masks, total=small.total)
        whole = (problem.q, problem.k, problem.v, problem.dout)
        q, k, v, dout = (layout.shard(x, rank=transport.rank, dim=1).to(bench.device) for x in whole)
        leaves = [x.requires_grad_(backward) for x in (q, k, v)]
        sink = None
        if problem.sink is not None:
            dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
            sink = problem.sink.to(bench.device, dtype, copy=True).requires_grad_(backward)
            leaves.append(sink)
        planned = [] if wants_lse else traffic(plan, small.shape(q.dtype, q.shape[-1]), batch=q.shape[0])
        marks = [mark(transport)]
        if wants_lse:
            forward = list(attention.with_lse(q, k, v, plan=plan, softcap=model.softcap, sink_logits=sink))
        else:
            forward = [attention(q, k, v, plan=plan, softcap=model.softcap, sink_logits=sink)]
        marks.append(mark(transport))
        grads: Sequence[Tensor] = torch.autograd.grad(forward[0], leaves, dout) if backward else ()
        marks.append(mark(transport))
        return [*forward, *grads], counted(marks, planned)

    ranks = bench.run(work)
    tensors: dict[str, Tensor] = {}
    names = NAMES if wants_lse else (NAMES[0], *NAMES[2:])
    for name, *shards in zip(names, *(shards for shards, _ in ranks), strict=False):  # without sinks the last is absent
        if name == NAMES[5]:
            tensors[name] = torch.stack(shards).sum(0)  # every rank has its share, as of any parameter's gradient
        else:
            tensors[name] = layout.unshard(shards, dim=2 if name == "lse" else 1)
    return Outcome(tensors, [sent for _, sent in ranks])


def dense(small: Small, problem: Problem, allowed: Tensor, *, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the same by plain torch operations on whole tensors, all in `dtype`, on the CPU."""
    q, k, v, dout = (x.to(dtype) for x in (problem.q, problem.k, problem.v, problem.dout))
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    sink = None
    if problem.sink is not None:
        sink = problem.sink.to(dtype, copy=True).requires_grad_()
        leaves.append(sink)
    out, lse = dense_attention(
        *leaves[:3],
        allowed=allowed.expand(small.model.num_heads, -1, -1),
        softcap=small.model.softcap,
        sink_logits=sink,
    )
    grads = torch.autograd.grad(out, leaves, dout)
    return dict(zip(NAMES, [out.detach(), lse.detach(), *grads], strict=False))


def kernel_name(small: Small, *, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Return who computes the tiles; where hops differ, how many of the first rank's are whose."""
    sharing = small.schedule.teams(small.cp).size
    split = HeadSplit(small.model.num_heads, small.model.num_kv_heads, sharing)
    request = Request(
        device_type=device.type,
        dtype=dtype,
        head_dim=head_dim,
        v_head_dim=head_dim,
        num_heads=len(split.q(0)),
        num_kv_heads=len(split.kv(0)),
        softcap=small.model.softcap is not None,
        predicate=any(not mask.banded for mask in small.masks),
    )
    kernel = resolve_kernel(kernel_for(small, dtype), request)
    hops = plan(small.layout, tuple(small.masks[:1]), small.schedule, rank=0, total=small.total).hops
    works = [hop.work((0, request.num_kv_heads), request.num_heads // request.num_kv_heads) for hop in hops]
    names = Counter(kernel.serving(work) for work in works if work.parts)
    return next(iter(names)) if len(names) == 1 else ", ".join(f"{count} {name}" for name, count in names.items())


def mark(transport: Transport) -> Traffic:
    """Return what a rank has sent so far."""
    sent = transport.traffic
    return Traffic(sent.hops, sent.bytes, dict(sent.bytes_to))


def counted(marks: Sequence[Traffic], planned: Sequence[Sent]) -> list[Counted]:
    """Return what was sent between neighbouring marks, each beside what was planned."""
    sent = []
    for before, after, want in zip(marks, marks[1:], planned, strict=False):
        bytes_to = {p: c - before.bytes_to.get(p, 0) for p, c in after.bytes_to.items()}
        bytes_to = {peer: count for peer, count in bytes_to.items() if count}
        due = {peer: count for peer, count in want.bytes_to.items() if count}
        sent.append(Counted(after.hops - before.hops, bytes_to, want.hops, due))
    return sent
