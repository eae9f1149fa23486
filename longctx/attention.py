"""THE composition: attention = token layout x communication schedule x mask x local kernel.

The schedule brings shards, the plan (layout and mask) says which tiles to compute, the kernel computes them. The four
meet here and in `attention_function.py`, which runs them, and nowhere else.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from longctx.attention_function import Attention, Call
from longctx.kernels.contract import Request, Scores
from longctx.kernels.mask import HeadMasks, Mask, causal
from longctx.kernels.softmax.op import resolve_kernel
from longctx.parallel.heads import HeadSplit
from longctx.parallel.layout import Layout
from longctx.parallel.plan import Plan, plan
from longctx.parallel.registry import resolve_schedule
from longctx.parallel.schedule import Schedule, Shape
from longctx.parallel.transport import Alone, ProcessGroupTransport, Transport

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


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
        self.schedule.teams(self.transport.size)

    def plan(self, masks: Sequence[Mask | HeadMasks], *, total: int) -> Plan:
        """Return this rank's plan for a micro-batch of sequences of `total` tokens.

        Args:
            masks: one for all rows of the batch, or one per row.
        """
        if not masks:
            raise ValueError("need one mask, or one per row; given none")
        return plan(self.layout, tuple(masks), self.schedule, rank=self.transport.rank, total=total)

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        plan: Plan,
        softmax_scale: float | None = None,
        softcap: float | None = None,
        sink_logits: Tensor | None = None,
    ) -> Tensor:
        """Attend this rank's queries to every rank's keys that the plan's masks let them see.

        All ranks of the group call it together, forward and backward.

        Args:
            q: `[B, T, H, D]` with T this rank's tokens in the layout's order.
            k, v: `[B, T, HK, D]` and `[B, T, HK, Dv]`; HK divides H.
            plan: from `plan`, for one row or for as many rows as the batch has.
            softmax_scale: default `D ** -0.5`.
            softcap: scores s become `softcap * tanh(s / softcap)`.
            sink_logits: `[H]`, a logit per head that joins the softmax and has no value (gpt-oss). The gradient is this
                rank's share, as that of any parameter: sum it over the ranks.

        Returns:
            out `[B, T, H, Dv]` in q's dtype.

        Raises:
            ValueError: shapes or dtypes that do not fit each other or the plan, heads that the schedule cannot split,
                or a kernel that cannot serve the request.
        """
        return self._apply(q, k, v, sink_logits, plan, softmax_scale, softcap, wants_lse=False)[0]

    def with_lse(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        plan: Plan,
        softmax_scale: float | None = None,
        softcap: float | None = None,
        sink_logits: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Do the same and return lse `[B, H, T]` too (accumulators' dtype, sinks included, not differentiable)."""
        return self._apply(q, k, v, sink_logits, plan, softmax_scale, softcap, wants_lse=True)

    def _apply(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sink_logits: Tensor | None,
        plan: Plan,
        softmax_scale: float | None,
        softcap: float | None,
        *,
        wants_lse: bool,
    ) -> tuple[Tensor, Tensor]:
        self._check(q, k, v, sink_logits, plan)
        heads, kv_heads = q.shape[2], k.shape[2]
        split = HeadSplit(heads, kv_heads, plan.teams.size)
        request = Request(
            device_type=q.device.type,
            dtype=q.dtype,
            head_dim=q.shape[-1],
            v_head_dim=v.shape[-1],
            num_heads=len(split.q(0)),
            num_kv_heads=len(split.kv(0)),
            softcap=softcap is not None,
            predicate=any(not mask.banded for mask in plan.masks),
        )
        shape = Shape(
            heads=request.num_heads,
            kv_heads=request.num_kv_heads,
            head_dim=q.shape[-1],
            v_head_dim=v.shape[-1],
            dtype=q.dtype,
        )
        scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
        call = Call(
            layout=self.layout,
            schedule=self.schedule,
            transport=self.transport,
            total=plan.total,
            plan=plan,
            kernel=resolve_kernel(self.kernel, request),
            scores=Scores(softmax_scale=scale, softcap=softcap),
            split=split,
            moves_queries=self.schedule.moves_queries(shape),
            wants_lse=wants_lse,
        )
        return Attention.apply(q, k, v, sink_logits, call)

    def _check(self, q: Tensor, k: Tensor, v: Tensor, sink_logits: Tensor | None, plan: Plan) -> None:
        check_qkv(q, k, v, tokens=plan.tokens)
        if (plan.layout, plan.schedule, plan.rank) != (self.layout, self.schedule, self.transport.rank):
            raise ValueError(
                f"the plan is rank {plan.rank}'s for {plan.layout} and {plan.schedule}; this is rank "
                f"{self.transport.rank} with {self.layout} and {self.schedule}: make it with this object's `plan`"
            )
        if plan.rows not in (1, q.shape[0]):
            raise ValueError(f"need one mask or one per row; given {plan.rows} for a batch of {q.shape[0]}")
        heads, kv_heads = q.shape[2], k.shape[2]
        self.schedule.check(self.layout.cp, heads=heads, kv_heads=kv_heads)
        for mask in plan.masks:
            if isinstance(mask, HeadMasks) and len(mask.masks) != heads:
                raise ValueError(f"the mask has {len(mask.masks)} heads, q has {heads}")
        if sink_logits is not None and sink_logits.shape != (heads,):
            raise ValueError(f"sink_logits must be [H] = [{heads}]; given {tuple(sink_logits.shape)}")


def check_qkv(q: Tensor, k: Tensor, v: Tensor, *, tokens: int) -> None:
    """Refuse shapes and dtypes that do not fit each other or a plan's tokens (ValueError)."""
    if len({q.dtype, k.dtype, v.dtype}) != 1:
        raise ValueError(f"q, k, v must have one dtype; given {q.dtype}, {k.dtype}, {v.dtype}")
    if q.dtype not in DTYPES:
        raise ValueError(f"q, k, v must be float64, float32, bfloat16 or float16; given {q.dtype}")
    fits = q.dim() == k.dim() == v.dim() == 4 and k.shape[:2] == v.shape[:2] == q.shape[:2]
    if not fits or k.shape[2] != v.shape[2] or k.shape[3] != q.shape[3] or q.shape[1] != tokens:
        raise ValueError(
            f"q, k, v must be [B, T, H, D], [B, T, HK, D], [B, T, HK, Dv] with T = {tokens} tokens, as "
            f"planned; given {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    heads, kv_heads = q.shape[2], k.shape[2]
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(
            f"num_heads must be a multiple of num_kv_heads; given {heads} and {kv_heads} "
            "(model.num_heads, model.num_kv_heads)"
        )


def context_parallel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layout: Layout | str = "striped",
    schedule: Schedule | str = "ring",
    mask: Mask | HeadMasks | Sequence[Mask | HeadMasks] | None = None,
    group: dist.ProcessGroup | Transport | None = None,
    kernel: str = "auto",
    softmax_scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute exact attention over sequences whose tokens are shared by the ranks of `group`: for any model.

    All ranks of the group call it together, forward and backward, with the same masks, shapes and options. That they do
    is not checked: where they differ, ranks wait for each other in vain, or compute with masks of their own.

    Args:
        q: `[B, T, H, D]` with T this rank's tokens, in the layout's order: `Layout.shard` cuts whole tensors, and
            `Layout.positions` gives the global positions, for RoPE.
        k, v: `[B, T, HK, D]` and `[B, T, HK, Dv]`; HK divides H.
        layout: a `Layout`, or its name: `contiguous`, `zigzag`, `striped`.
        schedule: a schedule, or its name with default options: see `parallel.registry.resolve_schedule`.
        mask: one for all rows, or a sequence with one per row; default causal. `kernels.mask` has them.
        group: the context-parallel process group; None = this process alone has whole sequences.
        kernel: `auto`, `torch`, `triton`, `flash_attn` or `reference`: see `kernels.softmax.op.resolve_kernel`.
        softmax_scale: default `D ** -0.5`.
        softcap: scores s become `softcap * tanh(s / softcap)`.
        sink_logits: `[H]`; its gradient is this rank's share, like any parameter's: sum it over the ranks.
        return_lse: return `(out, lse)`.

    Returns:
        out `[B, T, H, Dv]` in q's dtype; with `return_lse` also lse `[B, H, T]`, not differentiable.

    Raises:
        ValueError: shapes that do not fit each other, heads or ranks that the schedule cannot split, an option that the
            kernel cannot serve; before anything is sent.
    """
    transport = transport_of(group)
    if isinstance(layout, str):
        layout = Layout(layout, transport.size)  # type: ignore[arg-type]
    if isinstance(schedule, str):
        schedule = resolve_schedule(schedule, cp=transport.size, heads=q.shape[2])
    masks = [causal()] if mask is None else [mask] if isinstance(mask, Mask | HeadMasks) else list(mask)
    if not all(isinstance(each, Mask | HeadMasks) for each in masks):
        raise ValueError(
            f"mask must be a mask of longctx.kernels.mask, or one per row; given {type(mask).__name__}. "
            "A dense one is predicate(lambda q, k: dense[q, k])"
        )
    attention = ContextParallelAttention(layout=layout, schedule=schedule, transport=transport, kernel=kernel)
    attend = attention.with_lse if return_lse else attention
    return attend(
        q,
        k,
        v,
        plan=attention.plan(masks, total=q.shape[1] * layout.cp),
        softmax_scale=softmax_scale,
        softcap=softcap,
        sink_logits=sink_logits,
    )


def transport_of(group: dist.ProcessGroup | Transport | None) -> Transport:
    """Return how this rank talks to a group; None = it is alone."""
    if group is None:
        return Alone()
    if isinstance(group, dist.ProcessGroup):
        return ProcessGroupTransport(group)
    if not hasattr(group, "exchange"):
        raise ValueError(f"group must be a torch.distributed process group or None; given {group!r}")
    return group
