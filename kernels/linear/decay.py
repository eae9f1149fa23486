"""Decays inside of chunks, by the kind of gate. Only differences <= 0 are exponentiated."""

from typing import Protocol

import torch
from torch import Tensor

# Far below what float64 can hold: exp of it is 0. Keeps running sums of gates of -1e3 and below from losing digits.
FLOOR = -800.0


class Decay(Protocol):
    """Decays of the chunks `[B, N, H]` of C tokens; their batch dims may be 1 where decays are the same.

    Attributes:
        entering: `[B, N, H, C, 1 or K]`, of the state that enters, up to each token.
        leaving: `[B, N, H, C, 1 or K]`, from each token to the end of the chunk.
        across: `[B, N, H, 1 or K, 1]`, of a chunk.
    """

    entering: Tensor
    leaving: Tensor
    across: Tensor

    def products(self, *rows: Tensor, k: Tensor) -> list[Tensor]:
        """Return for each of `rows [B, N, H, C, K]` its decayed products with k, `[B, N, H, C, C]`.

        Above the diagonal they are finite, not more.
        """
        ...


class NoDecay:
    """Nothing decays."""

    def __init__(self, like: Tensor) -> None:
        self.entering = self.leaving = self.across = like.new_ones(1, 1, 1, 1, 1)

    def products(self, *rows: Tensor, k: Tensor) -> list[Tensor]:
        """Return the products."""
        return [row @ k.mT for row in rows]


class FixedDecay:
    """One log decay per head; the tokens that pad a chunk do not decay."""

    def __init__(self, g: Tensor, size: int, valid: Tensor | None) -> None:
        """Take `g [H]`, chunks of `size` tokens of which the first `valid [N]` count; None = all."""
        place = torch.arange(size, device=g.device)
        count = (torch.tensor([size], device=g.device) if valid is None else valid)[:, None, None]  # [N, 1, 1]
        g = g.clamp(min=FLOOR)[:, None]  # [H, 1]
        self.entering = torch.exp(g * (place + 1))[None, None, :, :, None]
        self.leaving = torch.exp(g * (count - 1 - place).clamp(min=0))[None, :, :, :, None]
        self.across = torch.exp(g * count)[None, :, :, :, None]
        self.within = torch.exp(g[:, :, None] * (place[:, None] - place).clamp(min=0))[None, None]

    def products(self, *rows: Tensor, k: Tensor) -> list[Tensor]:
        """Return the decayed products."""
        return [row @ k.mT * self.within for row in rows]


class ScalarDecay:
    """One log decay per token and head."""

    def __init__(self, g: Tensor) -> None:
        """Take `g [B, N, H, C]`."""
        total = g.clamp(min=FLOOR).cumsum(-1)
        end = total[..., -1:]
        self.entering = torch.exp(total)[..., None]
        self.leaving = torch.exp(end - total)[..., None]
        self.across = torch.exp(end)[..., None]
        self.within = torch.exp((total[..., :, None] - total[..., None, :]).clamp(max=0))

    def products(self, *rows: Tensor, k: Tensor) -> list[Tensor]:
        """Return the decayed products."""
        return [row @ k.mT * self.within for row in rows]


class DiagonalDecay:
    """One log decay per token, head and key dim: inside of the products, which halving keeps to decays <= 1.

    For a block of 2h tokens the products of its later h rows with its earlier h keys are those of rows that decay from
    the middle and keys that decay up to it. Its halves go the same way, down to single tokens, which do not decay.
    """

    def __init__(self, g: Tensor) -> None:
        """Take `g [B, N, H, C, K]`, C a power of 2."""
        self.total = g.clamp(min=FLOOR).cumsum(-2)
        end = self.total[..., -1:, :]
        self.entering = torch.exp(self.total)
        self.leaving = torch.exp(end - self.total)
        self.across = torch.exp(end).mT

    def products(self, *rows: Tensor, k: Tensor) -> list[Tensor]:
        """Return the decayed products."""
        size, half = k.shape[-2], 1
        results = [(row * k).sum(-1)[..., None, None] for row in rows]  # [..., blocks of one token, 1, 1]
        while half < size:
            blocks = (size // (2 * half), 2, half)
            early, late = self.total.unflatten(-2, blocks).unbind(-3)
            middle = early[..., -1:, :]
            keys = k.unflatten(-2, blocks)[..., 0, :, :] * torch.exp(middle - early)
            decays = torch.exp(late - middle)
            for i, row in enumerate(rows):
                product = (row.unflatten(-2, blocks)[..., 1, :, :] * decays) @ keys.mT
                first, second = results[i].unflatten(-3, blocks[:2]).unbind(-3)
                above = torch.cat([first, torch.zeros_like(first)], dim=-1)
                results[i] = torch.cat([above, torch.cat([product, second], dim=-1)], dim=-2)
            half *= 2
        return [result.squeeze(-3) for result in results]
