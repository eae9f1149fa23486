"""Decay factors: exp of log decays <= 0, and exactly 0 where they are too small to matter.

Numbers at the edge of underflow are no more exact than 0, and slow: a CPU multiplies matrices with denormal numbers a
hundred times slower, and libraries' exp is that slow where it underflows. The product of two factors is not denormal
either: the limits are half of the way.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import threshold

# Log decays from which on nothing is left: e^-43 = 2e-19, a trillionth of what float32 can tell from 1.
NOTHING = {torch.float32: -43.0, torch.float64: -300.0}


def factors(g: Tensor) -> Tensor:
    """Return the factors of log decays, -inf included."""
    return flush(g.clamp(min=NOTHING[g.dtype] - 1).exp_())


def flush(x: Tensor) -> Tensor:
    """Set factors, or products of two, to 0 in place where nothing is left."""
    return threshold(x, math.exp(NOTHING[x.dtype]), 0.0, inplace=True)


class Factors(torch.autograd.Function):
    """The same, differentiable; where nothing is left the gradient is 0 too."""

    @staticmethod
    def forward(ctx: Any, g: Tensor) -> Tensor:
        """Return the factors."""
        found = factors(g)
        ctx.save_for_backward(found)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """Return the gradient of the log decays."""
        (found,) = ctx.saved_tensors
        return grad * found
