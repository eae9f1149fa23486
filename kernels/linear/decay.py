"""Decays inside of chunks, by the kind of gate. Only sums of log decays, all <= 0, are exponentiated."""

from dataclasses import dataclass

import torch
from torch import Tensor

from longctx.kernels.linear.factors import Factors
from longctx.kernels.linear.products import DiagonalProducts, ScalarProducts


@dataclass(frozen=True, slots=True)
class Decayed:
    """Decays of the chunks `[B, N, H]` of C tokens, and products under them; a dim is 1 where they are the same.

    Attributes:
        products: of each of the rows with the keys, `[B, N, H, C, C]`, lower triangular.
        entering: `[B, N, H, C, 1 or K]`, of the state that enters, up to each token; None = it does not.
        leaving: `[B, N, H, C, 1 or K]`, from each token to the end of the chunk; None = nothing does.
        across: `[B, N, H, 1 or K, 1]`, of a whole chunk.
    """

    products: list[Tensor]
    entering: Tensor | None
    leaving: Tensor | None
    across: Tensor


def undecayed(k: Tensor, rows: tuple[Tensor, ...]) -> Decayed:
    """Return keys' and rows' `[B, N, H, C, K]` products if nothing decays."""
    lower = k.new_ones(k.shape[-2], k.shape[-2]).tril()
    return Decayed([(row @ k.mT).mul_(lower) for row in rows], None, None, k.new_ones(1, 1, 1, 1, 1))


def fixed(g: Tensor, k: Tensor, rows: tuple[Tensor, ...], *, tokens: Tensor | None) -> Decayed:
    """Return those under one log decay per head, `g [H]`; what fills up a chunk does not decay.

    Args:
        tokens: int64 `[N]`, how many each chunk has; None = C.
    """
    size = k.shape[-2]
    place = torch.arange(size, device=g.device)
    count = (place[-1:] + 1 if tokens is None else tokens)[:, None, None]  # [N, 1, 1]
    g = g.clamp(min=-1e6)[:, None]  # [H, 1]; -inf times no tokens would be NaN
    within = Factors.apply(g[..., None] * (place[:, None] - place).clamp(min=0)).tril()
    return Decayed(
        [row @ k.mT * within for row in rows],
        entering=Factors.apply(g * (place + 1))[None, None, ..., None],
        leaving=Factors.apply(g * (count - 1 - place).clamp(min=0))[None, ..., None],
        across=Factors.apply(g * count)[None, ..., None],
    )


def per_token(g: Tensor, k: Tensor, rows: tuple[Tensor, ...]) -> Decayed:
    """Return those under log decays per token and head, `[B, N, H, C]`, or also per key dim, `[B, N, H, C, K]`."""
    scalar = g.dim() < k.dim()
    function = ScalarProducts if scalar else DiagonalProducts
    entering, leaving, *products = function.apply(g[..., None] if scalar else g, k, *rows)
    return Decayed(products, entering, leaving, entering[..., -1:, :].mT)
