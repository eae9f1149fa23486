"""What tokens read of states that are known only after their sweep: `out + queries S`, S what entered the segment."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longctx.kernels.linear.chunks import Block
from longctx.kernels.precision import without_autocast


class Read(torch.autograd.Function):
    """A block of chunks at a time. The gradient of S is summed chunk by chunk, as a sweep does: long sums lose more."""

    @staticmethod
    def forward(
        ctx: Any, blocks: list[Block], dtype: torch.dtype, out: Tensor, queries: Tensor, states: Tensor
    ) -> Tensor:
        """Take `out [B, N, C, H, V]`, `queries [B, N, C, H, K]`, `states [B, P, H, K, V]`; return out in a dtype."""
        total = torch.empty_like(out, dtype=dtype)
        for block in blocks:
            query = _heads_first(queries, block)
            read = query @ states[:, slice(*block.segments), None]
            torch.add(_of(out, block), read.movedim(-3, -2), out=_of(total, block))
        ctx.blocks, ctx.dtype = blocks, out.dtype
        ctx.save_for_backward(queries, states)
        return total

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, dtotal: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of out, queries and states."""
        queries, states = ctx.saved_tensors
        dqueries, dstates = torch.empty_like(queries), torch.zeros_like(states)
        dtotal = dtotal.to(ctx.dtype)
        for block in ctx.blocks:
            those = slice(*block.segments)
            query, grad = _heads_first(queries, block), _heads_first(dtotal, block)
            _of(dqueries, block).copy_((grad @ states[:, those, None].mT).movedim(-3, -2))
            dstates[:, those] += (query.mT @ grad).sum(2)
        return None, None, dtotal, dqueries, dstates


def _of(x: Tensor, block: Block) -> Tensor:
    """Return a block of `[B, N, ...]` by segments, `[B, P, n, ...]`, a view."""
    return x[:, block.first : block.end].unflatten(1, (block.segments[1] - block.segments[0], -1))


def _heads_first(x: Tensor, block: Block) -> Tensor:
    return _of(x, block).movedim(-2, -3).contiguous()
