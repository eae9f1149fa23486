"""THE composition: attention = token layout x communication schedule x mask x local kernel.

The schedule brings K/V shards, the plan (layout and mask) says which tiles to compute, the kernel computes them. The
four meet here and nowhere else.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longctx.kernels.contract import LocalKernel, Request
from longctx.kernels.mask import Mask, causal, documents
from longctx.kernels.merge import Partial, accumulator_dtype, empty_partial
from longctx.kernels.softmax.op import KERNELS, resolve_kernel
from longctx.parallel.layout import Layout
from longctx.parallel.plan import Plan, plans_for
from longctx.parallel.registry import resolve_schedule
from longctx.parallel.schedule import Schedule
from longctx.parallel.transport import Transport


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """The four factors, by name.

    Attributes:
        layout: `contiguous`, `zigzag` or `striped`: which positions a rank owns.
        width: tokens per stripe; `striped` only.
        schedule: `ring` or `local`: whose K/V arrives when.
        documents: hide other documents of a packed sequence.
        kernel: `auto`, `torch` or `reference`: who computes a tile.
    """

    layout: str = "striped"
    width: int = 1
    schedule: str = "ring"
    documents: bool = True
    kernel: str = "auto"

    def validate(self) -> None:
        """Refuse unknown names and impossible products."""
        self.make_layout(cp=1)
        schedule = resolve_schedule(self.schedule)
        if not schedule.distributed and self.layout != "contiguous":
            raise ValueError(
                f"attention.schedule={self.schedule} keeps a sequence on one rank in its order, so attention.layout "
                f"must be contiguous; given {self.layout}. Use attention.schedule=ring for layout {self.layout}"
            )
        if self.kernel not in KERNELS:
            raise ValueError(f"attention.kernel={self.kernel} is not known; known are {', '.join(KERNELS)}")

    def make_layout(self, cp: int) -> Layout:
        """Return the token layout over `cp` ranks."""
        return Layout(self.layout, cp, self.width)  # type: ignore[arg-type]

    def mask(self, cu_seqlens: Sequence[int]) -> Mask:
        """Return the causal mask of one packed sequence with these document bounds."""
        return causal() & documents(tuple(cu_seqlens)) if self.documents else causal()


@dataclass(frozen=True, kw_only=True)
class ContextParallelAttention:
    """Attention over a context-parallel group: one object per (layout, schedule, group), used by every layer."""

    layout: Layout
    schedule: Schedule
    transport: Transport
    kernel: str = "auto"

    def __post_init__(self) -> None:
        if self.layout.cp != self.transport.size:
            raise ValueError(
                f"the layout is for cp={self.layout.cp}, the transport's group has {self.transport.size} rank(s)"
            )
        if self.transport.size > 1 and not self.schedule.distributed:
            raise ValueError(
                f"attention.schedule={self.schedule.name} keeps a sequence on one rank; the group has "
                f"{self.transport.size}. Use attention.schedule=ring"
            )

    def plans(self, masks: Sequence[Mask], *, total: int) -> tuple[Plan, ...]:
        """Return this rank's plans for a micro-batch: one for all rows, or one per row where their masks differ."""
        return plans_for(self.layout, masks, self.schedule, rank=self.transport.rank, total=total)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, plans: Sequence[Plan], softmax_scale: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """Attend this rank's queries to every rank's keys that the plans' masks let them see.

        All ranks of the group call it together, forward and backward.

        Args:
            q: `[B, T, H, D]` with T this rank's tokens in the layout's order.
            k, v: `[B, T, HK, D]` and `[B, T, HK, Dv]`; HK divides H.
            plans: from `plans`; one, or one per row.
            softmax_scale: default `D ** -0.5`.

        Returns:
            out `[B, T, H, Dv]` in q's dtype, and lse `[B, H, T]` (float32, not differentiable).
        """
        request = Request(
            device_type=q.device.type,
            dtype=q.dtype,
            head_dim=q.shape[-1],
            v_head_dim=v.shape[-1],
            num_heads=q.shape[2],
            num_kv_heads=k.shape[2],
        )
        if len({q.dtype, k.dtype, v.dtype}) != 1:
            raise ValueError(f"q, k, v must have one dtype; given {q.dtype}, {k.dtype}, {v.dtype}")
        if not plans or len(plans) not in (1, q.shape[0]):
            raise ValueError(f"need one plan or one per row; given {len(plans)} for a batch of {q.shape[0]}")
        if any(plan.layout != self.layout or plan.rank != self.transport.rank for plan in plans):
            raise ValueError(
                f"the plans are rank {plans[0].rank}'s for {plans[0].layout}; this is rank {self.transport.rank} with "
                f"{self.layout}: make them with this object's `plans`"
            )
        tokens, ours = {plan.tokens for plan in plans}, q.shape[:2]
        alike = k.shape[:2] == v.shape[:2] == ours and k.shape[2] == v.shape[2] and k.shape[3] == q.shape[3]
        if tokens != {ours[1]} or not alike:
            raise ValueError(
                f"q, k, v must be [B, T, H, D], [B, T, HK, D], [B, T, HK, Dv] with T = {sorted(tokens)} tokens, as "
                f"planned; given {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
            )
        scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
        call = _Call(self.schedule, self.transport, resolve_kernel(self.kernel, request), tuple(plans), scale)
        return _Attention.apply(q, k, v, call)


@dataclass(frozen=True)
class _Call:
    schedule: Schedule
    transport: Transport
    kernel: LocalKernel
    plans: tuple[Plan, ...]
    softmax_scale: float

    def rows(self) -> list[tuple[slice, Plan]]:
        """Return which batch rows each plan serves."""
        if len(self.plans) == 1:
            return [(slice(None), self.plans[0])]
        return [(slice(row, row + 1), plan) for row, plan in enumerate(self.plans)]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, call: _Call) -> tuple[Tensor, Tensor]:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()  # once, rather than at every hop
        partial = empty_partial(q, v_head_dim=v.shape[-1])

        def attend(source: int, k_shard: Tensor, v_shard: Tensor) -> None:
            for rows, plan in call.rows():
                call.kernel.forward(
                    q[rows],
                    k_shard[rows],
                    v_shard[rows],
                    tiles=plan.tiles_of(source),
                    softmax_scale=call.softmax_scale,
                    partial=Partial(partial.out[rows], partial.lse[rows]),
                )

        call.schedule.forward(call.transport, k, v, attend=attend)
        out = partial.out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, partial.lse)
        ctx.call = call
        ctx.mark_non_differentiable(partial.lse)
        return out, partial.lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out, lse = ctx.saved_tensors
        call: _Call = ctx.call
        dout = dout.contiguous()
        wide = accumulator_dtype(q.dtype)
        dq = torch.zeros(q.shape, dtype=wide, device=q.device)

        def attend(source: int, k_shard: Tensor, v_shard: Tensor) -> tuple[Tensor, Tensor]:
            dk = torch.zeros(k_shard.shape, dtype=wide, device=k_shard.device)
            dv = torch.zeros(v_shard.shape, dtype=wide, device=v_shard.device)
            for rows, plan in call.rows():
                call.kernel.backward(
                    q[rows],
                    k_shard[rows],
                    v_shard[rows],
                    tiles=plan.tiles_of(source),
                    softmax_scale=call.softmax_scale,
                    dout=dout[rows],
                    out=out[rows],
                    lse=lse[rows],
                    dq=dq[rows],
                    dk=dk[rows],
                    dv=dv[rows],
                )
            return dk, dv

        dk, dv = call.schedule.backward(call.transport, k, v, attend=attend)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None
