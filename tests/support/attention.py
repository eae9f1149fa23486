"""Run the composition on shards and put the results together, next to dense attention on whole tensors."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from longctx.attention import ContextParallelAttention
from longctx.kernels.mask import Mask, causal, chunked, documents, full, predicate, prefix_lm, sliding_window
from longctx.kernels.softmax.reference import dense_attention
from longctx.parallel.layout import Layout
from longctx.parallel.registry import resolve_schedule
from longctx.parallel.transport import Transport

LAYOUTS = {
    "contiguous": ("contiguous", 1),
    "zigzag": ("zigzag", 1),
    "striped": ("striped", 1),
    "striped3": ("striped", 3),
}
HEADS = {"mha": (2, 2), "gqa": (4, 2), "mqa": (3, 1)}
MASKS = (
    *("full", "causal", "window", "two_sided", "documents", "documents_window", "documents_full"),
    *("sinks_window", "sinks_two_sided", "documents_sinks_window", "prefix", "prefix_window", "prefix_documents"),
    *("prefix_per_document", "chunked", "chunked_documents"),
)


def make_mask(name: str, total: int) -> Mask:
    """Return a mask by name; documents are of length 1, of odd lengths, and longer than a shard.

    "predicate" is no band, for what takes predicates; it is not among `MASKS`.
    """
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
        "predicate": causal() & predicate(_not_a_multiple_of_three),
    }[name]


def _not_a_multiple_of_three(q: Tensor, k: Tensor) -> Tensor:
    return (q * k) % 3 != 0


@dataclass
class Problem:
    """Whole tensors: `q, dout [B, T, H, D]`, `k, v [B, T, HK, D]`."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor

    def to(self, dtype: torch.dtype) -> "Problem":
        return Problem(*(x.to(dtype) for x in (self.q, self.k, self.v, self.dout)))


def make_problem(total: int, heads: tuple[int, int], *, batch: int = 1, head_dim: int = 8, seed: int = 0) -> Problem:
    """Return random float64 tensors."""
    generator = torch.Generator().manual_seed(seed)
    q_shape, kv_shape = (batch, total, heads[0], head_dim), (batch, total, heads[1], head_dim)
    shapes = (q_shape, kv_shape, kv_shape, q_shape)
    return Problem(*(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes))


def dense(problem: Problem, masks: list[Mask]) -> list[Tensor]:
    """Return out, lse, dq, dk, dv of dense attention, row by row with its mask."""
    positions = torch.arange(problem.q.shape[1])
    rows = []
    for row, mask in enumerate(masks):
        q, k, v = (x[row : row + 1].detach().requires_grad_() for x in (problem.q, problem.k, problem.v))
        out, lse = dense_attention(q, k, v, allowed=mask.allowed(positions, positions))
        grads = torch.autograd.grad(out, (q, k, v), problem.dout[row : row + 1])
        rows.append([out.detach(), lse.detach(), *grads])
    return [torch.cat(parts) for parts in zip(*rows, strict=True)]


def sharded(
    transport: Transport, layout: Layout, problem: Problem, masks: list[Mask], *, schedule: str, kernel: str
) -> list[Tensor]:
    """Return this rank's shards of out, lse, dq, dk, dv."""
    total = problem.q.shape[1]
    attention = ContextParallelAttention(
        layout=layout, schedule=resolve_schedule(schedule), transport=transport, kernel=kernel
    )
    shards = [layout.shard(x, rank=transport.rank, dim=1) for x in (problem.q, problem.k, problem.v, problem.dout)]
    q, k, v = (x.requires_grad_() for x in shards[:3])
    out, lse = attention(q, k, v, plans=attention.plans(masks, total=total))
    grads = torch.autograd.grad(out, (q, k, v), shards[3])
    return [out.detach(), lse.detach(), *grads]


def together(layout: Layout, ranks: list[list[Tensor]]) -> list[Tensor]:
    """Put all ranks' shards of out, lse, dq, dk, dv back into position order."""
    return [layout.unshard([rank[i] for rank in ranks], dim=2 if i == 1 else 1) for i in range(5)]


def assert_equal(got: list[Tensor], want: list[Tensor], tolerance: float) -> None:
    """Compare out, lse, dq, dk, dv; -inf must be where -inf is, and NaN nowhere."""
    for name, ours, ref in zip(("out", "lse", "dq", "dk", "dv"), got, want, strict=True):
        assert torch.equal(torch.isneginf(ours), torch.isneginf(ref)), name
        finite = ~torch.isneginf(ref)
        error = (ours[finite] - ref[finite]).abs().max().item() if finite.any() else 0.0
        assert error < tolerance, f"{name}: {error:.3e}"
