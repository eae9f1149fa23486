"""The composition as one autograd function: what a rank does between q, k, v and out, and back."""

import logging
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longctx.arrangement import Arrangement
from longctx.kernels.contract import LocalKernel, Scores, WorkList
from longctx.kernels.merge import accumulator_dtype, empty_partial
from longctx.kernels.precision import without_autocast
from longctx.kernels.softmax.delta import row_delta
from longctx.kernels.softmax.sink import join_sink, sink_gradient
from longctx.parallel.heads import to_heads, to_tokens
from longctx.parallel.plan import Plan
from longctx.parallel.schedule import KvHeads, Rows

_log = logging.getLogger(__name__)
_told: "WeakKeyDictionary[WorkList, set[str]]" = WeakKeyDictionary()


@dataclass(frozen=True, kw_only=True)
class Call(Arrangement):
    """Everything but the tensors. `moves_queries`: queries go round in the backward pass, K/V stay."""

    plan: Plan
    kernel: LocalKernel
    scores: Scores
    moves_queries: bool
    wants_lse: bool


class Attention(torch.autograd.Function):
    """`(q, k, v, sink_logits | None, Call) -> (out, lse)`; lse is empty where it is not wanted."""

    @staticmethod
    @without_autocast
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sink_logits: Tensor | None, call: Call
    ) -> tuple[Tensor, Tensor]:
        q_share, kv_share = call.shares
        team, order = call.team, call.order(q.device)
        q, k, v = to_heads(team, (q, k, v), (q_share, kv_share, kv_share), order)
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()  # once, rather than at every hop
        partial = empty_partial(q, v_head_dim=v.shape[-1])

        def attend(source: int, kv_heads: KvHeads, k_part: Tensor, v_part: Tensor) -> None:
            work = call.plan.key_hops[source].work(kv_heads, q.shape[2] // k.shape[2])
            _tell("forward", source, work, call.kernel)
            call.kernel.forward(q, k_part, v_part, work=work, scores=call.scores, partial=partial)

        call.schedule.forward(call.ring, call.plan.needs, k, v, attend=attend)
        sink = None
        if sink_logits is not None:
            sink = sink_logits.detach()[call.own_heads].to(partial.lse.dtype)
            join_sink(partial, sink)
        (out,) = to_tokens(team, (partial.out.to(q.dtype),), (q_share,), order)
        ctx.save_for_backward(q, k, v, out, partial.lse, sink)
        ctx.call = call
        ctx.sink_dtype = None if sink_logits is None else sink_logits.dtype
        lse = partial.lse
        if not call.wants_lse:
            lse = lse.new_empty(0)
        elif team.size > 1:
            (lse,) = to_tokens(team, (lse.transpose(1, 2).unsqueeze(-1),), (q_share,), order)
            lse = lse.squeeze(-1).transpose(1, 2)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        call: Call = ctx.call
        q, k, v, out, lse, sink = ctx.saved_tensors
        q_share, kv_share = call.shares
        team, order = call.team, call.order(q.device)
        delta = row_delta(dout, out).transpose(1, 2).unsqueeze(-1)  # [B, T, H, 1]
        dout, delta = to_heads(team, (dout, delta), (q_share, q_share), order)
        rows = Rows(q, dout.contiguous(), lse.transpose(1, 2), delta.squeeze(-1))
        dq, dk, dv = (_rotate_queries if call.moves_queries else _rotate_keys)(call, rows, k, v)
        dsink = None
        if sink is not None:
            dsink = lse.new_zeros(call.split.heads)
            dsink[call.own_heads] = sink_gradient(sink, lse=lse, delta=rows.delta.transpose(1, 2))
            dsink = dsink.to(ctx.sink_dtype)
        # Sums over all hops are complete; only those of repeated KV heads are not.
        kv_dtype = dk.dtype if call.split.repeats_kv else k.dtype
        grads = (dq.to(q.dtype), dk.to(kv_dtype), dv.to(kv_dtype))
        dq, dk, dv = to_tokens(team, grads, (q_share, kv_share, kv_share), order)
        return dq, dk.to(k.dtype), dv.to(v.dtype), dsink, None


def _rotate_keys(call: Call, rows: Rows, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute dq, dk, dv with K/V going round and the queries at home."""
    wide = accumulator_dtype(k.dtype)
    dq = torch.zeros(rows.q.shape, dtype=wide, device=k.device)
    group = rows.q.shape[2] // k.shape[2]

    def attend(source: int, kv_heads: KvHeads, k_part: Tensor, v_part: Tensor) -> tuple[Tensor, Tensor]:
        dk = torch.zeros(k_part.shape, dtype=wide, device=k_part.device)
        dv = torch.zeros(v_part.shape, dtype=wide, device=v_part.device)
        work = call.plan.key_hops[source].work(kv_heads, group)
        _tell("backward", source, work, call.kernel)
        _backward(call, work, rows=rows, k=k_part, v=v_part, dq=dq, dk=dk, dv=dv)
        return dk, dv

    dk, dv = call.schedule.backward(call.ring, call.plan.needs, k, v, attend=attend)
    return dq, dk, dv


def _rotate_queries(call: Call, rows: Rows, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute dq, dk, dv with the queries going round and K/V at home (BurstAttention, arXiv 2403.09347)."""
    wide = accumulator_dtype(k.dtype)
    dk = torch.zeros(k.shape, dtype=wide, device=k.device)
    dv = torch.zeros(v.shape, dtype=wide, device=k.device)
    hops, group = call.plan.query_hops, rows.q.shape[2] // k.shape[2]

    def attend(source: int, part: Rows) -> Tensor:
        dq = torch.zeros(part.q.shape, dtype=wide, device=k.device)
        work = hops[source].work((0, k.shape[2]), group)
        _tell("backward, its queries", source, work, call.kernel)
        _backward(call, work, rows=part, k=k, v=v, dq=dq, dk=dk, dv=dv)
        return dq

    dq = call.schedule.backward_queries(call.ring, call.plan.needs, rows, attend=attend, wide=wide)
    return dq, dk, dv


def _backward(
    call: Call, work: WorkList, *, rows: Rows, k: Tensor, v: Tensor, dq: Tensor, dk: Tensor, dv: Tensor
) -> None:
    call.kernel.backward(
        rows.q,
        k,
        v,
        work=work,
        scores=call.scores,
        dout=rows.dout,
        delta=rows.delta.transpose(1, 2),
        lse=rows.lse.transpose(1, 2),
        dq=dq,
        dk=dk,
        dv=dv,
    )


def _tell(what: str, source: int, work: WorkList, kernel: LocalKernel) -> None:
    """Log who computes a hop, once for each work and pass."""
    if _log.isEnabledFor(logging.DEBUG) and what not in (told := _told.setdefault(work, set())):
        told.add(what)
        tiles = sum(len(part.tiles) for part in work.parts)
        _log.debug("%s, shard of %d: %d tiles by %s", what, source, tiles, kernel.serving(work))
