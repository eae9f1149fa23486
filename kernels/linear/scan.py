"""States from chunk to chunk: S -> M S + R, over all chunks of each segment."""

from typing import Any

import torch
from torch import Tensor

from longctx.kernels.linear.affine import apply, transposed


class Scan(torch.autograd.Function):
    """The states that enter the chunks, and those after the segments; nothing but them is kept for the backward."""

    @staticmethod
    def forward(
        ctx: Any, transition: Tensor, state: Tensor, initial: Tensor, counts: tuple[int, ...]
    ) -> tuple[Tensor, Tensor]:
        """Run over `transition [B, N, H, ...]`, `state [B, N, H, K, V]` from `initial [B, P, H, K, V]`.

        Returns:
            The states before the chunks, like `state`; those after the segments, like `initial`.
        """
        before, after = torch.empty_like(state), torch.empty_like(initial)
        for segment, (first, end) in enumerate(_ranges(counts)):
            running = initial[:, segment]
            for n in range(first, end):
                before[:, n] = running
                running = apply(transition[:, n], running) + state[:, n]
            after[:, segment] = running
        ctx.save_for_backward(transition, before)
        ctx.counts = counts
        return before, after

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Run the other way, with the transposed transitions."""
        dbefore, dafter = grads
        transition, before = ctx.saved_tensors
        dstate, dinitial = torch.empty_like(before), torch.empty_like(dafter)
        for segment, (first, end) in enumerate(_ranges(ctx.counts)):
            running = dafter[:, segment]
            for n in reversed(range(first, end)):
                dstate[:, n] = running
                running = apply(transposed(transition[:, n]), running) + dbefore[:, n]
            dinitial[:, segment] = running
        dtransition = None
        if ctx.needs_input_grad[0]:
            if transition.shape[-1] == 1:
                dims = (-1,) if transition.shape[-2] > 1 or before.shape[-2] == 1 else (-2, -1)
                dtransition = (dstate * before).sum(dims, keepdim=True)
            else:
                dtransition = dstate @ before.mT
        return dtransition, dstate, dinitial, None


def _ranges(counts: tuple[int, ...]) -> list[tuple[int, int]]:
    """Return the first chunk of each segment and that after its last one."""
    ranges, first = [], 0
    for count in counts:
        ranges.append((first, first + count))
        first += count
    return ranges
