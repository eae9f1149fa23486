"""What a gate over blocks learns from: attention itself, summed up by blocks (SeerAttention, arXiv 2410.13276).

For a query t and a KV head, the target of a past block b is the greatest probability that a query head of the group
gives to a key of b, normalised over past blocks, and the loss is KL(target || softmax of the gate's logits). Neither
T x T scores nor T x N probabilities are ever whole: a chunk of queries meets the keys chunk by chunk and keeps each
block's greatest score and its lse, and the gradient is made while the target is at hand.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from longctx.kernels.block_sparse.blocks import Blocks
from longctx.kernels.block_sparse.routing.seer import past_logits
from longctx.kernels.block_sparse.routing.topk import SCORES, Chunk, chunk_shape, chunks, scored
from longctx.kernels.precision import without_autocast


@dataclass(frozen=True, eq=False, kw_only=True)
class Teacher:
    """The attention that a gate learns from.

    Attributes:
        q: `[B, T, H, D]`.
        keys: `[B, total, HK, D]`, of all positions.
        document_of: int64 `[R, total]`.
        softcap: of its scores.
        sink_logits: `[H]`.
    """

    q: Tensor
    keys: Tensor
    document_of: Tensor
    softcap: float | None = None
    sink_logits: Tensor | None = None


def gate_loss(
    gate_q: Tensor,
    gate_k: Tensor,
    *,
    teacher: Teacher,
    blocks: Blocks,
    positions: Tensor,
    first: Tensor,
    scores: int = SCORES,
) -> Tensor:
    """Return the sum over tokens and KV heads of KL(target || gate), divided by the number of KV heads.

    Differentiable, once, in the gate's queries and keys only. Tokens without a past block have no part in it.

    Args:
        gate_q: `[B, T, HK, E]`; gate_k: `[B, N, HK, E]`, of all blocks. float32 (float64).
        blocks: all blocks.
        positions: int64 `[T]`; first: int64 `[R, T]`.
        scores: that are there at once.
    """
    loss: Tensor = _GateLoss.apply(gate_q, gate_k, teacher, blocks, positions, first, scores)
    return loss


def block_target(chunk: Chunk, teacher: Teacher, *, blocks: Blocks, scores: int = SCORES) -> Tensor:
    """Return the log of the target, -inf for what is not past (NaN where nothing is): `[B, n, h, block_size, N]`.

    Everything stays a logarithm: the probabilities of all past blocks may underflow together.

    Args:
        chunk: of the teacher's queries.
    """
    group, size = chunk.q.shape[3:5]
    q = chunk.q.flatten(3, 4) * chunk.q.shape[-1] ** -0.5  # [B, n, h, G block, D]
    most = q.new_full((*chunk.q.shape[:5], blocks.count), float("-inf"))
    lse = q.new_full(chunk.q.shape[:5], float("-inf"))
    if teacher.sink_logits is not None:  # one key more, of every query of a head
        sinks = teacher.sink_logits.to(q.dtype).unflatten(0, (-1, group))[chunk.heads]  # [h, G]
        lse = sinks[None, None, :, :, None].expand_as(lse)
    earliest, last = torch.stack([chunk.first.min() // size, chunk.positions.max()]).tolist()
    step = max(1, scores // (q[..., 0].numel() * size))  # blocks
    for begin in range(earliest, last // size + 1, step):
        here = slice(begin * size, min((begin + step) * size, last + 1))
        place = torch.arange(here.start, here.stop, device=q.device)
        same = teacher.document_of[:, None, None, here] == chunk.first[..., None]
        seen = same & (place <= chunk.positions[..., None])  # [R, n, block, keys]
        part = teacher.keys[:, here, chunk.heads].permute(0, 2, 3, 1)[:, None].to(q.dtype)  # [B, 1, h, D, keys]
        s = torch.matmul(q, part).unflatten(3, (group, size))
        if teacher.softcap is not None:
            s = teacher.softcap * torch.tanh(s / teacher.softcap)
        s = s.masked_fill(~seen[:, :, None, None], float("-inf"))
        lse = torch.logaddexp(lse, torch.logsumexp(s, dim=-1))
        filled = F.pad(s, (0, -s.shape[-1] % size), value=float("-inf")).unflatten(-1, (-1, size))
        most[..., begin : begin + filled.shape[-2]] = filled.amax(-1)
    relative = (most - lse[..., None]).amax(3)  # over the group: log of the greatest probability
    return torch.log_softmax(relative.masked_fill(~chunk.past(blocks)[:, :, None], float("-inf")), dim=-1)


class _GateLoss(torch.autograd.Function):
    """The gradient of KL in a logit is gate - target: made with the loss, while the target is at hand."""

    @staticmethod
    @without_autocast
    def forward(
        ctx: Any,
        gate_q: Tensor,
        gate_k: Tensor,
        teacher: Teacher,
        blocks: Blocks,
        positions: Tensor,
        first: Tensor,
        scores: int,
    ) -> Tensor:
        batch, tokens, kv_heads, width = gate_q.shape
        size = blocks.block_size
        rows = size * (teacher.q.shape[2] // kv_heads)
        shape = chunk_shape(batch=batch, kv_heads=kv_heads, rows=rows, keys=blocks.count, scores=scores)
        cut = [
            chunks(each, kv_heads=kv_heads, block_size=size, positions=positions, first=first, shape=shape)
            for each in (teacher.q, gate_q)
        ]
        total = gate_q.new_zeros(())
        dq, dk = torch.zeros_like(gate_q), torch.zeros_like(gate_k)
        for chunk, gate in zip(*cut, strict=True):
            past = chunk.past(blocks)
            hidden = ~past[:, :, None]  # [R, n, 1, block, N]
            target = block_target(chunk, teacher, blocks=blocks, scores=scores)
            logits = past_logits(scored(gate, gate_k), past, size=width)[:, :, :, 0]
            given = torch.log_softmax(logits, dim=-1)  # [B, n, h, block, N]; NaN where nothing is past
            weight = target.exp().masked_fill(hidden, 0.0)
            total += (weight * (target - given).masked_fill(hidden, 0.0)).sum()
            error = (given.exp().masked_fill(hidden, 0.0) - weight) * (width**-0.5 / kv_heads)
            keys = gate_k[:, :, chunk.heads].permute(0, 2, 1, 3)[:, None]  # [B, 1, h, N, E]
            of_tokens = torch.matmul(error, keys).permute(0, 1, 3, 2, 4).flatten(1, 2)
            dq[:, chunk.tokens, chunk.heads] = of_tokens[:, : tokens - chunk.tokens.start]
            dk[:, :, chunk.heads] += torch.einsum("bchtn,bchte->bnhe", error, gate.q[:, :, :, 0])
        ctx.save_for_backward(dq, dk)
        return total / kv_heads

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dq, dk = ctx.saved_tensors
        return grad * dq, grad * dk, *(None,) * 5
