"""Run the composition on shards and put the results together, next to dense attention on whole tensors."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from longctx.attention import ContextParallelAttention
from longctx.kernels.mask import (
    HeadMasks,
    Mask,
    causal,
    chunked,
    documents,
    full,
    per_head,
    plain_masks,
    predicate,
    prefix_lm,
    sliding_window,
)
from longctx.kernels.softmax.reference import dense_attention
from longctx.parallel.layout import Layout
from longctx.parallel.registry import resolve_schedule
from longctx.parallel.schedule import Schedule
from longctx.parallel.schedules.all_gather import AllGather
from longctx.parallel.schedules.ring import DoubleRing, Ring, Ulysses, Usp
from longctx.parallel.transport import Transport

SOFTCAP = 2.0
LAYOUTS = {
    "contiguous": ("contiguous", 1),
    "zigzag": ("zigzag", 1),
    "striped": ("striped", 1),
    "striped3": ("striped", 3),
}
HEADS = ("mha", "gqa", "mqa")
SCORES = ("plain", "sink", "softcap", "sink_softcap")


def make_heads(name: str, cp: int) -> tuple[int, int]:
    """Return heads that any schedule can split over cp ranks; the KV heads of gqa need not divide by cp."""
    return {"mha": (cp, cp), "gqa": {1: (4, 2), 2: (4, 2), 3: (6, 2), 4: (8, 4), 8: (8, 2)}[cp], "mqa": (cp, 1)}[name]


def make_schedule(kind: str, cp: int) -> Schedule:
    """Return a schedule of `SCHEDULES` over cp ranks."""
    two = 2 if cp % 2 == 0 and cp > 2 else 1
    usp = 2 if cp % 2 == 0 else cp
    return {
        "ring": Ring(backward_moves="rotate_kv"),
        "burst": Ring(backward_moves="rotate_q"),
        "double_ring": DoubleRing(ranks_per_ring=two, backward_moves="rotate_kv"),
        "double_burst": DoubleRing(ranks_per_ring=two, backward_moves="rotate_q"),
        "all_gather": AllGather(),
        "ulysses": Ulysses(),
        "usp": Usp(ulysses=usp, innermost="ulysses", backward_moves="rotate_kv"),
        "usp_spread": Usp(ulysses=usp, innermost="ring", backward_moves="rotate_q"),
    }[kind]


SCHEDULES = ("ring", "burst", "double_ring", "double_burst", "all_gather", "ulysses", "usp", "usp_spread")


def arranged(kind: str, cp: int) -> str:
    """Return the kind with its arrangement, such as `usp2x2`, for ids."""
    schedule = make_schedule(kind, cp)
    if isinstance(schedule, DoubleRing):
        return f"{kind}{schedule.ranks_per_ring}x{cp // schedule.ranks_per_ring}"
    return f"{kind}{schedule.ulysses}x{cp // schedule.ulysses}" if isinstance(schedule, Usp) else kind


MASKS = (
    *("full", "causal", "window", "two_sided", "documents", "documents_window", "documents_full"),
    *("sinks_window", "sinks_two_sided", "documents_sinks_window", "prefix", "prefix_window", "prefix_documents"),
    *("prefix_per_document", "chunked", "chunked_documents", "per_head", "predicate"),
)


def make_mask(name: str, total: int, *, heads: int = 4) -> Mask | HeadMasks:
    """Return a mask by name; documents are of length 1, of odd lengths, and longer than a shard."""
    cuts = sorted({0, 1, 2, max(total // 3, 1) + 1, max(total - 2, 1), total})
    bounds = tuple(cut for cut in cuts if cut <= total)
    packed = documents(bounds)
    # None of the first document, all of the second, about half of the others.
    prefixes = [(end - start) // 2 for start, end in pairwise(bounds)]
    prefixes[:2] = [0, bounds[2] - bounds[1]] if len(prefixes) > 1 else [0]
    return {
        "full": full(),
        "causal": causal(),
        "window": sliding_window(5),
        "two_sided": sliding_window(3, 2),
        "documents": packed & causal(),
        "documents_window": packed & sliding_window(4),
        "documents_full": packed,
        "sinks_window": sliding_window(4, sinks=2),
        "sinks_two_sided": sliding_window(3, 2, sinks=3),
        "documents_sinks_window": packed & sliding_window(2, sinks=2),
        "prefix": prefix_lm(total // 3),
        "prefix_window": prefix_lm(total // 2) & sliding_window(5, 3),
        "prefix_documents": packed & prefix_lm(3),
        "prefix_per_document": prefix_lm(prefixes, bounds),
        "chunked": chunked(5) & causal(),
        "chunked_documents": packed & chunked(4),
        "per_head": packed
        & per_head([causal() if head % 3 == 0 else sliding_window(head + 1) for head in range(heads)]),
        "predicate": causal() & predicate(_not_a_multiple_of_three),
    }[name]


def _not_a_multiple_of_three(q: Tensor, k: Tensor) -> Tensor:
    return (q * k) % 3 != 0


@dataclass
class Problem:
    """Whole tensors: `q, dout [B, T, H, D]`, `k, v [B, T, HK, D]`, `sink_logits [H]`."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    sink_logits: Tensor

    def to(self, dtype: torch.dtype) -> "Problem":
        return Problem(*(x.to(dtype) for x in (self.q, self.k, self.v, self.dout, self.sink_logits)))


def make_problem(
    total: int,
    heads: tuple[int, int],
    *,
    batch: int = 1,
    head_dim: int = 8,
    v_head_dim: int | None = None,
    seed: int = 0,
) -> Problem:
    """Return random float64 tensors."""
    generator = torch.Generator().manual_seed(seed)
    v_head_dim = v_head_dim or head_dim

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return Problem(
        randn(batch, total, heads[0], head_dim),
        randn(batch, total, heads[1], head_dim),
        randn(batch, total, heads[1], v_head_dim),
        randn(batch, total, heads[0], v_head_dim),
        randn(heads[0]),
    )


def dense(problem: Problem, masks: Sequence[Mask | HeadMasks], *, scores: str = "plain") -> list[Tensor]:
    """Return out, lse, dq, dk, dv, d(sink_logits) of dense attention, row by row with its mask (one = for all)."""
    positions = torch.arange(problem.q.shape[1])
    batch = problem.q.shape[0]
    rows = []
    for row, mask in enumerate(masks if len(masks) == batch else list(masks) * batch):
        q, k, v = (x[row : row + 1].detach().requires_grad_() for x in (problem.q, problem.k, problem.v))
        sink = problem.sink_logits.detach().requires_grad_()
        allowed = [each.allowed(positions, positions) for each in plain_masks(mask)]
        out, lse = dense_attention(
            q,
            k,
            v,
            allowed=torch.stack(allowed) if len(allowed) > 1 else allowed[0],
            softcap=SOFTCAP if "softcap" in scores else None,
            sink_logits=sink if "sink" in scores else None,
        )
        grads = torch.autograd.grad(out, (q, k, v, sink), problem.dout[row : row + 1], materialize_grads=True)
        rows.append([out.detach(), lse.detach(), *grads])
    together = [torch.cat(parts) for parts in list(zip(*rows, strict=True))[:5]]
    return [*together, sum(row[5] for row in rows)]


def sharded(
    transport: Transport,
    layout: Layout,
    problem: Problem,
    masks: Sequence[Mask | HeadMasks],
    *,
    schedule: Schedule | str,
    kernel: str,
    scores: str = "plain",
) -> list[Tensor]:
    """Return this rank's shards of out, lse, dq, dk, dv, and its share of d(sink_logits)."""
    total = problem.q.shape[1]
    if isinstance(schedule, str):
        schedule = resolve_schedule(schedule)
    attention = ContextParallelAttention(layout=layout, schedule=schedule, transport=transport, kernel=kernel)
    shards = [layout.shard(x, rank=transport.rank, dim=1) for x in (problem.q, problem.k, problem.v, problem.dout)]
    q, k, v = (x.requires_grad_() for x in shards[:3])
    sink = problem.sink_logits.detach().requires_grad_()
    out, lse = attention.with_lse(
        q,
        k,
        v,
        plan=attention.plan(masks, total=total),
        softcap=SOFTCAP if "softcap" in scores else None,
        sink_logits=sink if "sink" in scores else None,
    )
    grads = torch.autograd.grad(out, (q, k, v, sink), shards[3], materialize_grads=True)
    return [out.detach(), lse.detach(), *grads]


def together(layout: Layout, ranks: list[list[Tensor]]) -> list[Tensor]:
    """Put all ranks' shards of out, lse, dq, dk, dv back into position order, and add up d(sink_logits)."""
    whole = [layout.unshard([rank[i] for rank in ranks], dim=2 if i == 1 else 1) for i in range(5)]
    return [*whole, sum(rank[5] for rank in ranks)]


NAMES = ("out", "lse", "dq", "dk", "dv", "dsink")


def assert_equal(got: list[Tensor], want: list[Tensor], tolerance: float) -> None:
    """Compare out, lse, dq, dk, dv, d(sink_logits), or the first few; -inf must be where -inf is, and NaN nowhere."""
    for name, ours, ref in zip(NAMES[: len(got)], got, want, strict=True):
        assert torch.equal(torch.isneginf(ours), torch.isneginf(ref)), name
        finite = ~torch.isneginf(ref)
        error = (ours[finite] - ref[finite]).abs().max().item() if finite.any() else 0.0
        assert error < tolerance, f"{name}: {error:.3e}"
