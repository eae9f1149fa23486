"""From one end of the segments to the other, some chunks at a time, and back.

A block of chunks takes its tokens and the states that enter to outputs and the states that leave. Only the states
between blocks are kept: the backward makes each block's terms again, with their graph, which gives their gradients.
Nothing that is T x C, or T/C states, ever exists for the whole sequence.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longctx.kernels.linear.chunks import Block, Chunks
from longctx.kernels.linear.contract import Gate
from longctx.kernels.linear.decay import Decayed, fixed, per_token, undecayed
from longctx.kernels.linear.scan import Scan
from longctx.kernels.linear.sight import Documents
from longctx.kernels.linear.terms import Terms, terms
from longctx.kernels.precision import without_autocast

# Tokens times heads times batch of a block: what a core's cache holds; launches count on other devices, caches do not.
BLOCK_ON_CPU, BLOCK = 1 << 12, 1 << 19


class Inputs(NamedTuple):
    """The tensors of a call as `[B, N, C, H, ...]`, those of a block as `[B, N, H, C, ...]`; g is `[H]` where fixed."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor | None
    beta: Tensor | None


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a sweep has to know apart from the tensors.

    Attributes:
        gate: kind of the log decays.
        scale: of q.
        dtype: of states and of what is computed.
        chunks: the grid.
        tokens: int64 `[N]`, how many tokens each chunk has; None = all are full.
        documents: None = one.
    """

    gate: Gate
    scale: float
    dtype: torch.dtype
    chunks: Chunks
    tokens: Tensor | None
    documents: Documents | None

    def blocks(self, q: Tensor) -> list[Block]:
        """Return the blocks for `q [B, N, C, H, K]`."""
        batch, _, size, heads, _ = q.shape
        return self.chunks.blocks(max(1, (BLOCK_ON_CPU if q.device.type == "cpu" else BLOCK) // (batch * size * heads)))

    def part(self, x: Tensor, block: Block) -> Tensor:
        """Return a block of `[B, N, C, H, ...]`, heads before tokens, to compute with."""
        return x[:, block.first : block.end].transpose(2, 3).to(self.dtype).contiguous()

    def inputs(self, whole: Inputs, block: Block) -> Inputs:
        """Return the tensors of a block."""
        parts: list[Any] = [x if x is None or x.dim() == 1 else self.part(x, block) for x in whole]
        return Inputs(*parts)

    def terms(self, block: Block, inputs: Inputs) -> Terms:
        """Return the terms of a block."""
        q, k, v, g, beta = inputs
        return terms(
            q,
            k,
            v,
            decayed=self._decayed(g, k, (q,) if beta is None else (q, k), here=slice(block.first, block.end)),
            beta=None if beta is None else beta[..., None],
            sight=None if self.documents is None else self.documents.sight(block.first, block.end, self.dtype),
        )

    def _decayed(self, g: Tensor | None, k: Tensor, rows: tuple[Tensor, ...], *, here: slice) -> Decayed:
        if g is None:
            return undecayed(k, rows)
        if self.gate == "fixed":
            return fixed(g, k, rows, tokens=None if self.tokens is None else self.tokens[here])
        return per_token(g, k, rows)


@dataclass(frozen=True, slots=True)
class _Step:
    """What a block makes of its tokens and of what enters it; chunk by chunk, `[B, N, H, ...]`.

    Attributes:
        terms: of the chunks.
        before: `[B, N, H, K, V]`, the states that enter the chunks.
        after: `[B, P, H, K, V]`, those that leave the block.
        further: `[B, N, H, C, K]`, what reads a further state that enters the segment; None = nobody asks.
        reach: `[B, P, H, ...]`, the transition from the segment's begin to the end of the block.
    """

    terms: Terms
    before: Tensor
    after: Tensor
    further: Tensor | None
    reach: Tensor | None


def _step(task: Task, block: Block, inputs: Inputs, state: Tensor, reach: Tensor | None) -> _Step:
    made = task.terms(block, inputs)
    segments = (block.segments[1] - block.segments[0], -1)
    transition = made.transition.unflatten(1, segments)
    before, after = Scan.apply(transition, made.state.unflatten(1, segments), state)
    before = before.flatten(1, 2)
    if reach is None:
        return _Step(made, before, after, None, None)
    reached, reach = Scan.apply(transition, None, reach)
    reached = reached.flatten(1, 2)
    return _Step(made, before, after, made.queries @ reached, reach)


class Sweep(torch.autograd.Function):
    """All chunks of a call, a block at a time."""

    @staticmethod
    def forward(
        ctx: Any, task: Task, initial: Tensor, unit: Tensor | None, *tensors: Any
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Go forwards over the tensors of `Inputs`.

        Args:
            initial: `[B, P, H, K, V]`, the states that enter the segments.
            unit: the identity as transition `[B, P, H, K, K]`, if outputs of the delta rule have to answer to further
                states that enter the segments, of which nothing is known yet; None = there are none.

        Returns:
            out: `[B, N, C, H, V]`, in v's dtype; with `unit` in the states', since something comes on top.
            final: `[B, P, H, K, V]`, the states after the segments.
            queries: with `unit`, `[B, N, C, H, K]`: further states S give a token `queries S` more; else None.
            transition: with `unit`, `[B, P, H, K, K]`: and are M S after the segments; else None.
        """
        whole = Inputs(*tensors)
        final, queries, transition = torch.empty_like(initial), None, None
        out = torch.empty_like(whole.v, dtype=whole.v.dtype if unit is None else task.dtype)
        if unit is not None:
            queries = torch.empty_like(whole.q, dtype=task.dtype)
            transition = torch.empty_like(unit, memory_format=torch.contiguous_format)
        entered: list[Tensor | None] = []
        state, reach = initial, unit
        for block in task.blocks(whole.q):
            here, those = slice(block.first, block.end), slice(*block.segments)
            if block.begins:
                state, reach = initial[:, those], None if unit is None else unit[:, those]
            entered += [state, reach]
            step = _step(task, block, task.inputs(whole, block), state, reach)
            torch.mul(_outputs(step).transpose(2, 3), task.scale, out=out[:, here])
            state, reach = step.after, step.reach
            if queries is not None and step.further is not None:
                torch.mul(step.further.transpose(2, 3), task.scale, out=queries[:, here])
            if block.ends:
                final[:, those] = state
                if transition is not None and reach is not None:
                    transition[:, those] = reach
        ctx.task = task
        ctx.save_for_backward(*tensors, *entered)
        ctx.set_materialize_grads(False)
        return out, final, queries, transition

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Go backwards: each block's graph once more, and through it."""
        task: Task = ctx.task
        saved = ctx.saved_tensors  # once: activation checkpointing unpacks them at each access
        whole, entered = Inputs(*saved[:5]), saved[5:]
        dout, dfinal, dqueries, dtransition = grads
        needs = ctx.needs_input_grad[3:]
        totals = [
            (torch.empty_like if x.dim() > 1 else torch.zeros_like)(x) if x is not None and need else None
            for x, need in zip(whole, needs, strict=True)
        ]
        dinitial: list[Tensor] = []
        dstate, dreach = dfinal, dtransition
        for i, block in reversed(list(enumerate(task.blocks(whole.q)))):
            those = slice(*block.segments)
            if block.ends:
                dstate, dreach = (None if x is None else x[:, those] for x in (dfinal, dtransition))
            leaves = [_leaf(x, need) for x, need in zip(task.inputs(whole, block), needs, strict=True)]
            state, reach = (_leaf(x, True) for x in entered[2 * i : 2 * i + 2])
            with torch.enable_grad():
                step = _step(task, block, Inputs(*leaves), state, reach)
            cotangents = [(step.after, dstate), (step.reach, dreach)]
            if dout is not None:
                cotangents += _gradients_of_factors(step, task.part(dout, block).mul(task.scale))
            if dqueries is not None:
                cotangents.append((step.further, task.part(dqueries, block).mul(task.scale)))
            dstate, dreach, *found = _gradients(cotangents, [state, reach, *leaves])
            if block.begins:
                assert dstate is not None
                dinitial.append(dstate)
            for x, total in zip(found, totals, strict=True):
                if x is not None and total is not None and total.dim() == 1:
                    total += x
                elif x is not None and total is not None:
                    total[:, block.first : block.end] = x.transpose(2, 3)
        return None, torch.cat(dinitial[::-1], dim=1), None, *totals


def _leaf(x: Tensor | None, need: bool) -> Any:
    return x if x is None else x.detach().requires_grad_(need)


def _outputs(step: _Step) -> Tensor:
    """Return `scores values + queries before`."""
    made = step.terms
    scores, values, queries, before = (x.flatten(0, 2) for x in (made.scores, made.values, made.queries, step.before))
    return torch.bmm(scores, values).baddbmm_(queries, before).view_as(made.values)


def _gradients_of_factors(step: _Step, dout: Tensor) -> list[tuple[Tensor | None, Tensor | None]]:
    """Return the gradients of the factors of `out = scores values + queries before`, which itself nobody needs."""
    made = step.terms
    with torch.no_grad():
        return [
            (made.scores, dout @ made.values.mT),
            (made.values, made.scores.mT @ dout),
            (made.queries, dout @ step.before.mT),
            (step.before, made.queries.mT @ dout),
        ]


def _gradients(
    cotangents: list[tuple[Tensor | None, Tensor | None]], inputs: list[Tensor | None]
) -> list[Tensor | None]:
    """Return the gradients of the inputs that want one, None for others; zeros where nothing depends on one."""
    pairs = [(x, dx) for x, dx in cotangents if x is not None and dx is not None and x.requires_grad]
    wanted = [x for x in inputs if x is not None and x.requires_grad]
    if not pairs or not wanted:
        return [x if x is None or not x.requires_grad else torch.zeros_like(x) for x in inputs]
    outputs, grads = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(outputs, wanted, grads, allow_unused=True, materialize_grads=True))
    return [next(found) if x is not None and x.requires_grad else None for x in inputs]
