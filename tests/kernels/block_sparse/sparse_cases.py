"""Selections, and attention to them through a kernel and densely: out, lse, dq, dk, dv, and dgates where there are."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longctx.kernels.block_sparse.contract import SparseKernel, Weights
from longctx.kernels.block_sparse.reference import selected_attention, selected_sum
from longctx.kernels.block_sparse.selection import Selection, selected_blocks
from longctx.kernels.contract import Scores
from longctx.kernels.merge import empty_partial
from longctx.kernels.softmax.delta import row_delta
from tests.support.tolerance import GRADIENT_FACTOR, OUTPUT_FACTOR, assert_within_budget, max_error

SUM_SCALE = 0.5  # a power of two: it rounds nothing


@dataclass(frozen=True, eq=False)
class Problem:
    """What a kernel is given; `gates [B, T, H, S]` where they are the weights."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    gates: Tensor | None
    selection: Selection
    weights: Weights
    softcap: float | None

    def to(self, dtype: torch.dtype) -> "Problem":
        """Return the same in another dtype."""
        tensors = [None if x is None else x.to(dtype) for x in (self.q, self.k, self.v, self.dout, self.gates)]
        return Problem(*tensors, self.selection, self.weights, self.softcap)  # type: ignore[arg-type]

    def on(self, device: str) -> "Problem":
        """Return the same on another device."""
        tensors = [None if x is None else x.to(device) for x in (self.q, self.k, self.v, self.dout, self.gates)]
        names = ("lo", "hi", "slot_class", "key_class")
        moved = {name: x if x is None else x.to(device) for name in names for x in [getattr(self.selection, name)]}
        selection = Selection(**moved, block_size=self.selection.block_size)
        return Problem(*tensors, selection, self.weights, self.softcap)  # type: ignore[arg-type]

    def other_draw(self, shift: int) -> "Problem":
        """Return the same problem with other numbers: each tensor's tokens moved on, by different distances."""
        tensors = [self.q, self.k, self.v, self.dout, self.gates]
        moved = [None if x is None else x.roll(shift * place, dims=1) for place, x in enumerate(tensors, start=1)]
        return Problem(*moved, self.selection, self.weights, self.softcap)  # type: ignore[arg-type]

    @property
    def scores(self) -> Scores:
        """Return how a query and a key make a score."""
        scale = SUM_SCALE if self.weights == "sum" else self.q.shape[-1] ** -0.5
        return Scores(softmax_scale=scale, softcap=self.softcap)


def blocks(tokens: int, *, heads: int, rows: int, block_size: int, slots: int = 4) -> Selection:
    """Select random earlier blocks and the own one, cut by a document; some queries lack some, a few see nothing."""
    generator = torch.Generator().manual_seed(tokens + block_size)
    positions = torch.arange(tokens)
    own, count = positions // block_size, -(-tokens // block_size)
    draws = torch.rand(rows, tokens, heads, count, generator=generator)
    draws = draws.masked_fill(torch.arange(count) >= own[:, None, None], -1.0)
    values, chosen = draws.topk(min(slots - 1, count), dim=-1)
    picked = torch.cat([torch.where(values < 0.2, -1, chosen), own[:, None, None].expand(rows, -1, heads, 1)], dim=-1)
    blind = torch.rand(rows, tokens, heads, 1, generator=generator) < 0.1
    first = torch.where(positions >= tokens // 3, tokens // 3, 0)[None].expand(rows, -1)
    picked = picked.masked_fill(blind, -1)
    return selected_blocks(picked, block_size=block_size, positions=positions, first=first)


def classes(tokens: int, *, heads: int, rows: int, block_size: int) -> Selection:
    """Let queries see keys of three random classes, each as far as it reaches; some keys are seen by nobody."""
    generator = torch.Generator().manual_seed(tokens + block_size)
    key_class = torch.randint(-1, 3, (rows, tokens, heads), generator=generator, dtype=torch.int32)
    place = torch.arange(tokens)[None, :, None].expand(rows, -1, heads)
    lo = torch.stack([place - 9, place * 0, place - 3], dim=-1)
    hi = torch.stack([place, place, place - 1], dim=-1)
    slot_class = torch.arange(3).roll(1).expand_as(lo).contiguous()
    return Selection(lo=lo, hi=hi, slot_class=slot_class, key_class=key_class, block_size=block_size)


def everything(tokens: int, *, heads: int, block_size: int) -> Selection:
    """Let a few queries see all before them, and the others 3 keys: thousands of pairs and one."""
    place = torch.arange(tokens)[None, :, None, None].expand(-1, -1, heads, -1)
    lo = torch.where(place % 7 == 3, 0, (place - 2).clamp(min=0))
    return Selection(lo=lo, hi=place, block_size=block_size)


def problem(
    selection: Selection,
    *,
    heads: int,
    kv_heads: int,
    batch: int = 1,
    dims: tuple[int, int] = (8, 8),
    weights: Weights = "softmax",
    softcap: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> Problem:
    """Draw tensors for a selection."""
    generator = torch.Generator().manual_seed(heads * 10 + kv_heads)
    tokens = selection.tokens
    shapes = [(heads, dims[0]), (kv_heads, dims[0]), (kv_heads, dims[1]), (heads, dims[1])]
    if weights == "gated":
        shapes.append((heads, selection.slots))
    drawn = [torch.randn(batch, tokens, *each, generator=generator, dtype=torch.float64) for each in shapes]
    tensors = [x.to(dtype) for x in drawn] + [None] * (5 - len(drawn))
    return Problem(*tensors, selection, weights, softcap)  # type: ignore[arg-type]


def run(kernel: SparseKernel, given: Problem, parts: Sequence[Tensor] | None = None) -> list[Tensor]:
    """Return what a kernel makes of it in the accumulators' dtype, given the keys at `parts` one part after the other.

    Gradients are added to ones, which are taken away again.
    """
    q, k, v, dout, gates = given.q, given.k, given.v, given.dout, given.gates
    parts = [torch.arange(q.shape[1], device=q.device)] if parts is None else parts
    partial = empty_partial(q, v_head_dim=v.shape[-1])
    what = {"selection": given.selection, "weights": given.weights, "gates": gates, "scores": given.scores}
    for places in parts:
        kernel.forward(q, k[:, places], v[:, places], k_positions=places, partial=partial, **what)
    grads = [None if x is None else torch.ones_like(x, dtype=partial.out.dtype) for x in (q, k, v, gates)]
    rows = {"dout": dout, "delta": row_delta(dout, partial.out.to(q.dtype)), "lse": partial.lse}
    for places in parts:
        mine = [x[:, places].contiguous() for x in grads[1:3]]
        what |= {"dq": grads[0], "dk": mine[0], "dv": mine[1], "dgates": grads[3]}
        kernel.backward(q, k[:, places], v[:, places], k_positions=places, **rows, **what)
        for whole, part in zip(grads[1:3], mine, strict=True):
            whole[:, places] = part
    return [partial.out, partial.lse, *(x - 1 for x in grads if x is not None)]


def dense(given: Problem) -> list[Tensor]:
    """Return the same by the formulas and autograd, in the dtype given; without lse zeros."""
    q, k, v = (x.detach().requires_grad_() for x in (given.q, given.k, given.v))
    gates = None if given.gates is None else given.gates.detach().requires_grad_()
    where = {"selection": given.selection, "k_positions": torch.arange(q.shape[1], device=q.device)}
    if given.weights == "sum":
        out = selected_sum(q * SUM_SCALE, k, v, **where)
        lse = torch.full_like(out[..., 0].transpose(1, 2), float("-inf"))
    else:
        out, lse = selected_attention(q, k, v, **where, gates=gates, softcap=given.softcap)
    leaves = [x for x in (q, k, v, gates) if x is not None]
    return [out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, given.dout)]


def largest_error(got: list[Tensor], want: list[Tensor]) -> float:
    """Return the largest error of all results; NaN if there is one. Equal infinities are no error."""
    return torch.tensor([max_error(a, b) for a, b in zip(got, want, strict=True)]).max().item()


def assert_low_precision(kernel: SparseKernel, given: Problem, parts: Sequence[Tensor] | None = None) -> None:
    """Apply the rule for low precision to all results; torch's errors are those of three draws."""
    got = run(kernel, given, parts)
    draws = [(dense(each), dense(each.to(torch.float64))) for each in (given, given.other_draw(3), given.other_draw(5))]
    for index, (name, ours) in enumerate(zip(NAMES, got, strict=False)):
        factor = OUTPUT_FACTOR if name in ("out", "lse") else GRADIENT_FACTOR
        (theirs, ref), *more = [(plain[index], truth[index]) for plain, truth in draws]
        assert_within_budget(ours, theirs, ref, factor=factor, name=name, more=more)


NAMES = ("out", "lse", "dq", "dk", "dv", "dgates")
