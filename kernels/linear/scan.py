"""States from chunk to chunk: S -> M S + R."""

from typing import Any

import torch
from torch import Tensor

from longctx.kernels.linear.affine import transposed


class Scan(torch.autograd.Function):
    """The states before each of some chunks, and that after them.

    Tensors are `[B, P, n, H, ...]`: n chunks in each of P segments. Only the states are kept for the backward.
    """

    @staticmethod
    def forward(ctx: Any, transition: Tensor, made: Tensor | None, entering: Tensor) -> tuple[Tensor, Tensor]:
        """Run over `transition [B, P, n, H, ...]` and `made [B, P, n, H, K, V]` (None = zeros).

        Args:
            entering: `[B, P, H, K, V]`.

        Returns:
            The states before the chunks `[B, P, n, H, K, V]`; that after them `[B, P, H, K, V]`.
        """
        count = transition.shape[2]
        states = entering.new_empty(*entering.shape[:2], count + 1, *entering.shape[2:])
        steps = states.unbind(2)
        steps[0].copy_(entering)
        _run(transition.unbind(2), None if made is None else made.unbind(2), steps)
        before = states[:, :, :-1]
        ctx.save_for_backward(transition, before)
        ctx.set_materialize_grads(True)
        return before, steps[-1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Run the other way, with the transposed transitions."""
        dbefore, dafter = grads
        transition, before = ctx.saved_tensors
        count = transition.shape[2]
        states = dafter.new_empty(*dafter.shape[:2], count + 1, *dafter.shape[2:])
        steps = states.unbind(2)[::-1]
        steps[0].copy_(dafter)
        _run(transposed(transition).unbind(2)[::-1], dbefore.unbind(2)[::-1], steps)
        dmade, dtransition = states[:, :, 1:], None
        if ctx.needs_input_grad[0]:
            if transition.shape[-1] > 1 or before.shape[-2] == 1:
                dtransition = dmade @ before.mT
            else:
                dims = (-1,) if transition.shape[-2] > 1 else (-2, -1)
                dtransition = (dmade * before).sum(dims, keepdim=True)
        return dtransition, dmade if ctx.needs_input_grad[1] else None, steps[-1]


def _run(transitions: tuple[Tensor, ...], made: tuple[Tensor, ...] | None, steps: tuple[Tensor, ...]) -> None:
    """Fill `steps[1:]` from `steps[0]`."""
    for i, transition in enumerate(transitions):
        if transition.shape[-1] > 1:
            torch.matmul(transition, steps[i], out=steps[i + 1])
            if made is not None:
                steps[i + 1].add_(made[i])
        elif made is None:
            torch.mul(transition, steps[i], out=steps[i + 1])
        else:
            torch.addcmul(made[i], transition, steps[i], out=steps[i + 1])
