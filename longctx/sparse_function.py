"""Selected attention over ranks as one autograd function: between q, k, v and out what a rank moves and computes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longctx.arrangement import Arrangement
from longctx.kernels.block_sparse.contract import SparseKernel, Weights
from longctx.kernels.block_sparse.selection import Selection, widened
from longctx.kernels.contract import Scores
from longctx.kernels.merge import Partial, accumulator_dtype, empty_partial
from longctx.kernels.precision import without_autocast
from longctx.kernels.softmax.delta import row_delta
from longctx.kernels.softmax.sink import join_sink, sink_gradient
from longctx.parallel.heads import to_heads, to_tokens
from longctx.parallel.schedule import KvHeads
from longctx.sparse_moves import Moves


@dataclass(frozen=True, kw_only=True)
class SparseCall(Arrangement):
    """Everything but the tensors.

    Attributes:
        selection: of this rank's heads and its team's tokens.
        moves: how K/V come here.
        places: positions of each team's tokens, int64, on the device of q.
    """

    kernel: SparseKernel
    weights: Weights
    scores: Scores
    selection: Selection
    moves: Moves
    places: tuple[Tensor, ...]

    def part(self, source: int, kv_heads: KvHeads, heads: int, all_kv_heads: int) -> "Part":
        """Return what is computed with some KV heads of a source's shard."""
        group = heads // all_kv_heads
        q_heads = slice(kv_heads[0] * group, kv_heads[1] * group)
        selections = []
        for one in self.selection.parts():
            each = one.heads // all_kv_heads
            selections.append(widened(one.of_heads(kv_heads[0] * each, kv_heads[1] * each)))
        tokens = self.moves.tokens(source)
        where = tokens if isinstance(tokens, slice) else tokens.to(self.places[source].device)
        return Part(selections, self.places[source][where], q_heads, slice(*kv_heads))


@dataclass(frozen=True)
class Part:
    """A kernel's selections, a call for each, the positions of their keys int64 `[Tk]`, and their heads."""

    selections: Sequence[Selection]
    k_positions: Tensor
    q_heads: slice
    kv_heads: slice


def on_team(arrangement: Arrangement, selection: Selection, *, device: torch.device) -> Selection:
    """Return the selection of this rank's heads for the tokens of its whole team: an exchange for each part."""
    team = arrangement.team
    if team.size == 1:
        return selection
    q_share, kv_share = arrangement.shares
    share = kv_share if selection.heads == arrangement.split.kv_heads else q_share
    order = arrangement.order(device)
    tensors = [x for x in (selection.lo, selection.hi, selection.slot_class) if x is not None]
    small = told_dtype(arrangement.total)
    moved = to_heads(team, [x.to(small) for x in tensors], [share] * len(tensors), order)
    lo, hi, *rest = moved
    key_class = selection.key_class
    if key_class is not None:
        key_class = key_class[:, :, torch.tensor(share[team.rank], device=key_class.device)]
    beside = None if selection.beside is None else on_team(arrangement, selection.beside, device=device)
    slot_class = rest[0] if rest else None
    return replace(selection, lo=lo, hi=hi, slot_class=slot_class, key_class=key_class, beside=beside)


def told_dtype(total: int) -> torch.dtype:
    """Return the dtype in which a team is told of positions: half the bytes, where those of the sequence fit."""
    return torch.int32 if total < 2**31 else torch.int64


class SelectedAttention(torch.autograd.Function):
    """`(q, k, v, sink_logits | None, gates | None, SparseCall) -> out`."""

    @staticmethod
    @without_autocast
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sink_logits: Tensor | None, gates: Tensor | None, call: SparseCall
    ) -> Tensor:
        q_share, kv_share = call.shares
        team, order = call.team, call.order(q.device)
        q, k, v = to_heads(team, (q, k, v), (q_share, kv_share, kv_share), order)
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        if gates is not None:
            ctx.gates_dtype = gates.dtype
            (gates,) = to_heads(team, (gates,), (q_share,), order)
        partial = empty_partial(q, v_head_dim=v.shape[-1])

        def attend(source: int, kv_heads: KvHeads, k_part: Tensor, v_part: Tensor) -> None:
            part = call.part(source, kv_heads, q.shape[2], k.shape[2])
            for selection in part.selections:
                call.kernel.forward(
                    q[:, :, part.q_heads],
                    k_part,
                    v_part,
                    selection=selection,
                    k_positions=part.k_positions,
                    weights=call.weights,
                    gates=None if gates is None else gates[:, :, part.q_heads],
                    scores=call.scores,
                    partial=Partial(partial.out[:, :, part.q_heads], partial.lse[:, part.q_heads]),
                )

        call.moves.forward(call.ring, k, v, attend=attend)
        sink = None
        if sink_logits is not None:
            sink = sink_logits.detach()[call.own_heads].to(partial.lse.dtype)
            join_sink(partial, sink)
        (out,) = to_tokens(team, (partial.out.to(q.dtype),), (q_share,), order)
        ctx.save_for_backward(q, k, v, out, partial.lse, sink, gates)
        ctx.call = call
        ctx.sink_dtype = None if sink_logits is None else sink_logits.dtype
        return out

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        call: SparseCall = ctx.call
        q, k, v, out, lse, sink, gates = ctx.saved_tensors
        q_share, kv_share = call.shares
        team, order = call.team, call.order(q.device)
        delta = row_delta(dout, out).transpose(1, 2).unsqueeze(-1)  # [B, T, H, 1]
        dout, delta = to_heads(team, (dout, delta), (q_share, q_share), order)
        dout, delta = dout.contiguous(), delta.squeeze(-1).transpose(1, 2)  # [B, H, T]
        wide = accumulator_dtype(q.dtype)
        dq = torch.zeros(q.shape, dtype=wide, device=q.device)
        dgates = None if gates is None else torch.zeros(gates.shape, dtype=wide, device=q.device)

        def attend(source: int, kv_heads: KvHeads, k_part: Tensor, v_part: Tensor) -> tuple[Tensor, Tensor]:
            part = call.part(source, kv_heads, q.shape[2], k.shape[2])
            heads = part.q_heads
            dk = torch.zeros(k_part.shape, dtype=wide, device=k_part.device)
            dv = torch.zeros(v_part.shape, dtype=wide, device=v_part.device)
            for selection in part.selections:
                call.kernel.backward(
                    q[:, :, heads],
                    k_part,
                    v_part,
                    selection=selection,
                    k_positions=part.k_positions,
                    weights=call.weights,
                    gates=None if gates is None else gates[:, :, heads],
                    scores=call.scores,
                    dout=dout[:, :, heads],
                    delta=delta[:, heads],
                    lse=lse[:, heads],
                    dq=dq[:, :, heads],
                    dk=dk,
                    dv=dv,
                    dgates=None if dgates is None else dgates[:, :, heads],
                )
            return dk, dv

        dk, dv = call.moves.backward(call.ring, k, v, attend=attend)
        dsink = None
        if sink is not None:
            dsink = lse.new_zeros(call.split.heads)
            dsink[call.own_heads] = sink_gradient(sink, lse=lse, delta=delta)
            dsink = dsink.to(ctx.sink_dtype)
        kv_dtype = wide if call.split.repeats_kv else k.dtype  # only sums of repeated KV heads are not complete
        dq, dk, dv = to_tokens(
            team, (dq.to(q.dtype), dk.to(kv_dtype), dv.to(kv_dtype)), (q_share, kv_share, kv_share), order
        )
        if dgates is not None:
            (dgates,) = to_tokens(team, (dgates.to(ctx.gates_dtype),), (q_share,), order)
        return dq, dk.to(k.dtype), dv.to(v.dtype), dsink, dgates, None
