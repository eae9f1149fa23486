"""The composition for linear attention: token layout x state passing x cuts x local kernel.

The kernel says what each segment of this rank does to a state, state passing brings the state that enters it, the
kernel finishes. What `attention.py` is for softmax, with states for K/V: their bytes do not grow with the sequence.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from longctx.kernels.linear.affine import Affine
from longctx.kernels.linear.contract import Cuts, LinearWork
from longctx.kernels.linear.op import check_initial_state, linear_request, resolve_kernel
from longctx.kernels.linear.short_conv import short_conv
from longctx.parallel.chain import Chain, chain
from longctx.parallel.cuts import Bounds, cuts, extended_documents
from longctx.parallel.halo import extend
from longctx.parallel.layout import Layout
from longctx.parallel.state_passing import StatePassing, pass_states
from longctx.parallel.transport import Transport


@dataclass(frozen=True, kw_only=True)
class StatePlan:
    """What one rank needs to know of a micro-batch: its segments, where documents begin, and whose states follow whose.

    Attributes:
        bounds: `cu_seqlens` of all rows, or one for all; None = nothing is packed.
    """

    layout: Layout
    rank: int
    total: int
    bounds: Sequence[Bounds] | None
    chain: Chain
    cuts: Cuts
    _extended: dict[int, Tensor | None] = field(default_factory=dict, repr=False, compare=False)

    def extended_documents(self, reach: int) -> Tensor | None:
        """Return the documents of this rank's tokens with `reach` tokens before each segment, int32 `[R, E]`."""
        if reach not in self._extended:
            device = None if self.cuts.documents is None else self.cuts.documents.device
            self._extended[reach] = extended_documents(
                self.layout, rank=self.rank, total=self.total, bounds=self.bounds, reach=reach, device=device
            )
        return self._extended[reach]


@dataclass(frozen=True, kw_only=True)
class ContextParallelLinearAttention:
    """Linear attention over a context-parallel group: one object per (layout, state passing, group, kernel)."""

    layout: Layout
    passing: StatePassing
    transport: Transport
    kernel: str = "auto"

    def __post_init__(self) -> None:
        if self.layout.cp != self.transport.size:
            raise ValueError(
                f"the layout is for cp={self.layout.cp}, the transport's group has {self.transport.size} rank(s)"
            )

    def plan(self, bounds: Sequence[Bounds] | None, *, total: int, device: torch.device) -> StatePlan:
        """Return this rank's plan for a micro-batch of sequences of `total` tokens.

        Args:
            bounds: `cu_seqlens` (0 ... total) of the packed documents, one for all rows of the batch or one per row;
                None = every sequence is one document.
            device: of the tokens.
        """
        rank = self.transport.rank
        if bounds is not None:  # what the caller does with its lists later is no concern of the plan
            bounds = tuple(tuple(operator.index(bound) for bound in row) for row in bounds)
        return StatePlan(
            layout=self.layout,
            rank=rank,
            total=total,
            bounds=bounds,
            chain=chain(self.layout, total),
            cuts=cuts(self.layout, rank=rank, total=total, bounds=bounds, device=device),
        )

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        plan: StatePlan,
        g: Tensor | None = None,
        beta: Tensor | None = None,
        scale: float | None = None,
        chunk_size: int | None = None,
        initial_state: Tensor | None = None,
    ) -> Tensor:
        """Run the recurrence over sequences whose tokens are shared by the ranks.

        All ranks of the group call it together, forward and backward.

        Args:
            q, k: `[B, T, H, K]` with T this rank's tokens in the layout's order.
            v: `[B, T, H, V]`.
            plan: from `plan`, for one row or for as many rows as the batch has.
            g: log decays <= 0: None, `[H]`, `[B, T, H]` or `[B, T, H, K]`, float32 (float64 for float64 inputs). The
                gradient of `[H]` is this rank's share, as that of any parameter: sum it over the ranks.
            beta: `[B, T, H]`: the delta rule; None = without.
            scale: of q; default `K ** -0.5`.
            chunk_size: tokens that are computed together; None = the kernel's own choice.
            initial_state: `[B, H, K, V]` before the sequence's first token, the same on all ranks; its gradient is
                this rank's share. Later documents start from 0.

        Returns:
            out `[B, T, H, V]` in q's dtype.

        Raises:
            ValueError: shapes or dtypes that do not fit each other or the plan, or a kernel that cannot serve them.
        """
        return self.with_state(
            q, k, v, plan=plan, g=g, beta=beta, scale=scale, chunk_size=chunk_size, initial_state=initial_state
        )[0]

    def with_state(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        plan: StatePlan,
        g: Tensor | None = None,
        beta: Tensor | None = None,
        scale: float | None = None,
        chunk_size: int | None = None,
        initial_state: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Do the same and return the state `[B, H, K, V]` after the last token too (None on the ranks without it).

        The backward exchanges gradients of states: every rank's loss must depend on its `out`, or the others wait.
        """
        self._check_plan(plan)
        if q.dim() != 4 or q.shape[1] != plan.cuts.tokens:
            raise ValueError(f"q must be [B, T, H, K] with T = {plan.cuts.tokens}, as planned; given {tuple(q.shape)}")
        self._check_rows(plan, q.shape[0])
        request = linear_request(q, k, v, g=g, beta=beta, chunk_size=chunk_size)
        check_initial_state(initial_state, q=q, v=v)
        kernel = resolve_kernel(self.kernel, request)
        with torch.autocast(q.device.type, enabled=False):  # it would round what is kept in float32 to 16 bits
            work = kernel.begin(
                q,
                k,
                v,
                g=g,
                beta=beta,
                scale=q.shape[-1] ** -0.5 if scale is None else scale,
                cuts=plan.cuts,
                chunk_size=chunk_size,
            )
            out, finals = work.finish(self._entering(work, initial_state, plan))
        rank, segment = plan.chain.links[-1]
        return out, finals[:, segment] if rank == plan.rank else None

    def _entering(self, work: LinearWork, initial_state: Tensor | None, plan: StatePlan) -> Tensor | None:
        """Return the states that enter this rank's segments, `[B, P, H, K, V]`, or None where all are zero."""
        links = plan.chain.links
        if len(links) == 1:
            return None if initial_state is None else initial_state[:, None]
        summary, first = work.summary(), links[0] == (plan.rank, 0)
        if initial_state is not None:
            initial_state = initial_state.to(summary.state.dtype)
            summary = _begun(summary, initial_state) if first else _anchored(summary, initial_state)
        states = pass_states(summary, passing=self.passing, chain=plan.chain, transport=self.transport)
        if initial_state is not None and first:
            states = torch.cat([initial_state[:, None], states[:, 1:]], dim=1)
        return states

    def convolve(self, x: Tensor, weight: Tensor, *, plan: StatePlan) -> Tensor:
        """Run a causal depthwise convolution over the tokens of each document.

        Args:
            x: `[B, T, C]`, this rank's tokens.
            weight: `[C, k]`; its last column meets the token itself.

        Returns:
            `[B, T, C]`. The gradient of `weight` is this rank's share.
        """
        self._check_plan(plan)
        if x.dim() != 3 or x.shape[1] != plan.cuts.tokens or weight.dim() != 2 or weight.shape[0] != x.shape[2]:
            raise ValueError(
                f"x must be [B, T, C] with T = {plan.cuts.tokens}, as planned, and weight [C, k]; given "
                f"{tuple(x.shape)} and {tuple(weight.shape)}"
            )
        self._check_rows(plan, x.shape[0])
        reach = weight.shape[1] - 1
        extended = extend(x, layout=self.layout, total=plan.total, transport=self.transport, reach=reach)
        return short_conv(extended, weight, lengths=plan.cuts.lengths, documents=plan.extended_documents(reach))

    def _check_plan(self, plan: StatePlan) -> None:
        if (plan.layout, plan.rank) != (self.layout, self.transport.rank):
            raise ValueError(
                f"the plan is rank {plan.rank}'s for {plan.layout}; this is rank {self.transport.rank} with "
                f"{self.layout}: make it with this object's `plan`"
            )

    def _check_rows(self, plan: StatePlan, batch: int) -> None:
        rows = 1 if plan.bounds is None else len(plan.bounds)
        if rows not in (1, batch):
            raise ValueError(f"need one cu_seqlens or one per row; given {rows} for a batch of {batch}")


class _Anchored(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, state: Tensor, anchor: Tensor) -> Tensor:
        ctx.save_for_backward(anchor)
        return state.view_as(state)

    @staticmethod
    def backward(ctx: Any, dstate: Tensor) -> tuple[Tensor, Tensor]:
        (anchor,) = ctx.saved_tensors
        return dstate, torch.zeros_like(anchor)


def _anchored(summary: Affine, initial_state: Tensor) -> Affine:
    """Return the summary, with a gradient if the initial state has one: all ranks have to take part in a backward."""
    state: Tensor = _Anchored.apply(summary.state, initial_state)  # type: ignore[no-untyped-call]
    return Affine(summary.transition, state)


def _begun(summary: Affine, initial_state: Tensor) -> Affine:
    """Let the sequence's first segment begin with a state: as a map, it makes it of nothing."""
    first = Affine(summary.transition[:, 0], summary.state[:, 0])(initial_state)
    return Affine(summary.transition, torch.cat([first[:, None], summary.state[:, 1:]], dim=1))
