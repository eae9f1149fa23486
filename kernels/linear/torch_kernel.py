"""The chunked form in plain torch: any device, any dtype, every kind.

Matrix products inside of chunks, a recurrence of states between them. Terms of chunks are computed some chunks at a
time, and once more in the backward: what is T x C is never kept.
"""

from typing import Any

import torch
from torch import Tensor

from longctx.kernels.linear.affine import Affine
from longctx.kernels.linear.chunks import Chunks, Sight, chunks_of, sight
from longctx.kernels.linear.contract import Cuts, Gate, LinearRequest, gate_of, state_dtype
from longctx.kernels.linear.decay import Decay, DiagonalDecay, FixedDecay, NoDecay, ScalarDecay
from longctx.kernels.linear.scan import Scan
from longctx.kernels.linear.terms import Terms, terms

CHUNK = 64


class TorchKernel:
    """All kinds, any device, in plain torch."""

    name = "torch"

    def unsupported(self, request: LinearRequest) -> str | None:
        """It serves everything; keys that decay dim by dim want a power of 2."""
        size = request.chunk_size
        if request.gate == "diagonal" and size is not None and size & (size - 1):
            return f"with a decay per key dim chunk_size must be a power of 2; given {size}"
        return None

    def begin(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        g: Tensor | None,
        beta: Tensor | None,
        scale: float,
        cuts: Cuts,
        chunk_size: int | None,
    ) -> "TorchWork":
        """Take up a call."""
        return TorchWork(q, k, v, g=g, beta=beta, scale=scale, cuts=cuts, chunk_size=chunk_size)


class TorchWork:
    """The chunks of one call."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        g: Tensor | None,
        beta: Tensor | None,
        scale: float,
        cuts: Cuts,
        chunk_size: int | None,
    ) -> None:
        gate = gate_of(g)
        self.chunks = chunks = chunks_of(cuts, chunk_size or CHUNK, power_of_two=gate == "diagonal")
        self.dtype = q.dtype
        self.recipe = _Recipe(gate, scale, state_dtype(q), chunks.size, chunks.valid(q.device), sight(cuts, chunks))
        tensors = [chunks.split(x) for x in (q, k, v)]
        per_token = gate in ("scalar", "diagonal")
        tensors.append(chunks.split(g) if g is not None and per_token else g)
        tensors.append(None if beta is None else chunks.split(beta))
        self.terms = Terms(*_TermsInBlocks.apply(self.recipe, *tensors))

    def summary(self) -> Affine:
        """Return the maps of the segments."""
        made = self.terms
        batch, _, heads, size, width = made.state.shape
        segments, counts = len(self.chunks.counts), self.chunks.counts
        nothing = made.state.new_zeros(batch, segments, heads, size, width)
        _, state = Scan.apply(made.transition, made.state, nothing, counts)
        shape = made.transition.shape
        matrix = shape[-1] > 1
        one = torch.eye(size, dtype=nothing.dtype, device=nothing.device) if matrix else nothing.new_ones(())
        one = one.expand(batch, segments, *shape[2:])
        _, transition = Scan.apply(made.transition, torch.zeros_like(made.transition), one, counts)
        return Affine(transition, state)

    def finish(self, states: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the outputs from the states that enter."""
        made = self.terms
        batch, _, heads, size, width = made.state.shape
        if states is None:
            states = made.state.new_zeros(batch, len(self.chunks.counts), heads, size, width)
        before, after = Scan.apply(made.transition, made.state, states, self.chunks.counts)
        out = made.out + made.queries @ before
        return self.chunks.join(out.transpose(2, 3)).to(self.dtype), after


class _Recipe:
    """How a block of chunks becomes terms."""

    def __init__(
        self, gate: Gate, scale: float, wide: torch.dtype, size: int, valid: Tensor | None, seen: Sight | None
    ) -> None:
        self.gate, self.scale, self.wide, self.size, self.valid, self.sight = gate, scale, wide, size, valid, seen

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None, first: int, end: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the terms of the chunks from `first` to `end`, given as `[B, N, C, H, ...]`."""
        wide = self.wide
        q, k, v = (x.to(wide).transpose(2, 3) for x in (q, k, v))
        made = terms(
            q * self.scale,
            k,
            v,
            decay=self.decay(g, k, first, end),
            beta=None if beta is None else beta.to(wide).transpose(2, 3)[..., None],
            sight=None if self.sight is None else self.sight.block(first, end),
        )
        return made.out, made.queries, made.transition, made.state

    def decay(self, g: Tensor | None, like: Tensor, first: int, end: int) -> Decay:
        """Return the decays of the chunks."""
        if g is None:
            return NoDecay(like)
        if self.gate == "fixed":
            return FixedDecay(g, self.size, None if self.valid is None else self.valid[first:end])
        return (ScalarDecay if self.gate == "scalar" else DiagonalDecay)(g.transpose(2, 3))


class _TermsInBlocks(torch.autograd.Function):
    """The terms of all chunks, a block of them at a time; the backward makes them again."""

    @staticmethod
    def forward(ctx: Any, recipe: _Recipe, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        """Take `[B, N, C, H, ...]`: q, k, v, g, beta."""
        ctx.recipe = recipe
        ctx.save_for_backward(*tensors)
        parts = [recipe(*_block(tensors, first, end), first, end) for first, end in _blocks(tensors)]
        return tuple(torch.cat(part, dim=1) for part in zip(*parts, strict=True))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Make each block's terms again, with their graph, and go back through it."""
        tensors = ctx.saved_tensors
        totals = [
            None if x is None or not need else torch.zeros_like(x)
            for x, need in zip(tensors, ctx.needs_input_grad[1:], strict=True)
        ]
        for first, end in _blocks(tensors):
            block = [
                None if x is None else x.detach().requires_grad_(t is not None)
                for x, t in zip(_block(tensors, first, end), totals)
            ]
            with torch.enable_grad():
                made = ctx.recipe(*block, first, end)
            pairs = [(m, dm[:, first:end]) for m, dm in zip(made, grads) if m.requires_grad]
            wanted = [x for x in block if x is not None and x.requires_grad]
            found = iter(torch.autograd.grad([m for m, _ in pairs], wanted, [dm for _, dm in pairs], allow_unused=True))
            for x, total in zip(tensors, totals):
                if total is not None:
                    part = next(found)
                    if part is not None:
                        (total if x.dim() == 1 else total[:, first:end]).add_(part)
        return None, *totals


def _blocks(tensors: tuple[Tensor | None, ...]) -> list[tuple[int, int]]:
    """Return ranges of chunks of about 2048 tokens."""
    batch, total, size = tensors[0].shape[:3]
    step = max(1, 2048 // (size * batch))
    return [(first, min(first + step, total)) for first in range(0, total, step)]


def _block(tensors: tuple[Tensor | None, ...], first: int, end: int) -> list[Tensor | None]:
    return [x if x is None or x.dim() == 1 else x[:, first:end] for x in tensors]
