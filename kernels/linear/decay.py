"""Decays inside of chunks, by the kind of gate. Only differences <= 0 are exponentiated."""

from typing import Protocol

import torch
from torch import Tensor

from longctx.kernels.linear.products import DiagonalProducts, ScalarProducts

# exp of it is 0 in float64 already; gates far below it would cost the running sums of their chunk their digits.
FLOOR = -800.0


class Decay(Protocol):
    """Decays of the chunks `[B, N, H]` of C tokens; a dim is 1 where they are the same.

    Attributes:
        entering: `[B, N, H, C, 1 or K]`, of the state that enters, up to each token.
        leaving: `[B, N, H, C, 1 or K]`, from each token to the end of the chunk.
        across: `[B, N, H, 1 or K, 1]`, of a whole chunk.
    """

    entering: Tensor
    leaving: Tensor
    across: Tensor

    def products(self, *rows: Tensor, k: Tensor) -> list[Tensor]:
        """Return for each of `rows [B, N, H, C, K]` its decayed products with k, lower triangular `[B, N, H, C, C]`."""
        ...


class NoDecay:
    """Nothing decays."""

    def __init__(self, size: int, like: Tensor) -> None:
        """Take C and a tensor of the dtype and device."""
        self.entering = self.leaving = self.across = like.new_ones(1, 1, 1, 1, 1)
        self._within = like.new_ones(size, size).tril()

    def products(self, *rows: Tensor, k: Tensor) -> list[Tensor]:
        """Return the products."""
        return [(row @ k.mT).mul_(self._within) for row in rows]


class FixedDecay:
    """One log decay per head; what fills up a chunk does not decay."""

    def __init__(self, g: Tensor, size: int, tokens: Tensor | None) -> None:
        """Take `g [H]`, C, and how many tokens each chunk has, `[N]`; None = C."""
        place = torch.arange(size, device=g.device)
        count = place[-1:] + 1 if tokens is None else tokens
        count = count[:, None, None]  # [N, 1, 1]
        g = g.clamp(min=FLOOR)[:, None]  # [H, 1]
        self.entering = torch.exp(g * (place + 1))[None, None, :, :, None]
        self.leaving = torch.exp(g * (count - 1 - place).clamp(min=0))[None, ..., None]
        self.across = torch.exp(g * count)[None, ..., None]
        self._within = torch.exp(g[:, :, None] * (place[:, None] - place).clamp(min=0)).tril()

    def products(self, *rows: Tensor, k: Tensor) -> list[Tensor]:
        """Return the decayed products."""
        return [row @ k.mT * self._within for row in rows]


class ScalarDecay:
    """One log decay per token and head."""

    def __init__(self, g: Tensor) -> None:
        """Take `g [B, N, H, C]`."""
        total = g.clamp(min=FLOOR).cumsum(-1)
        end = total[..., -1:]
        self.entering = torch.exp(total)[..., None]
        self.leaving = torch.exp(end - total)[..., None]
        self.across = torch.exp(end)[..., None]
        self._total = total

    def products(self, *rows: Tensor, k: Tensor) -> list[Tensor]:
        """Return the decayed products."""
        return list(ScalarProducts.apply(self._total, k, *rows))


class DiagonalDecay:
    """One log decay per token, head and key dim."""

    def __init__(self, g: Tensor) -> None:
        """Take `g [B, N, H, C, K]`, C a power of 2."""
        self._total = g.clamp(min=FLOOR).cumsum(-2)
        end = self._total[..., -1:, :]
        self.entering = torch.exp(self._total)
        self.leaving = torch.exp(end - self._total)
        self.across = torch.exp(end).mT

    def products(self, *rows: Tensor, k: Tensor) -> list[Tensor]:
        """Return the decayed products."""
        return list(DiagonalProducts.apply(self._total, k, *rows))
