"""Decays over spans of a chunk, each the product of its own factors: never the exponential of a difference.

G_i - G_j from running sums G would lose the digits of a weak gate next to a strong one: after a log gate of -1e3 a
float32 knows the sum to 6e-5 only, and after -inf nothing. Halving makes products cheap: a span from key j to query i
crosses the middle of exactly one block of 2, 4, 8 ... tokens, and

    exp(g_{j+1} + ... + g_i) = upto_j since_i

with `upto` the decay from the key's next token to the middle, `since` from there on to the query.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from longctx.kernels.linear.factors import factors, flush


class Spans:
    """The decays of `g [..., C, D]`, C a power of 2; walk through them, and they are known for the whole chunk too.

    Attributes:
        prefix: `[..., C, D]` after the walk, by a token's gate and those before it.
        suffix: `[..., C, D]` after the walk, by the gates after a token.
    """

    def __init__(self, g: Tensor) -> None:
        self.prefix = factors(g)
        self.suffix = torch.ones_like(self.prefix)

    def __iter__(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield half = 1, 2, 4 ... with `upto` and `since`, `[..., blocks, half, D]`; the next step changes them."""
        for half in halves(self.prefix.shape[-2]):
            first, second, ahead = early(self.prefix, half), late(self.prefix, half), early(self.suffix, half)
            yield half, ahead, second
            flush(ahead.mul_(second[..., -1:, :]))
            flush(second.mul_(first[..., -1:, :]))


def spans_gradient(dprefix: Tensor, dsuffix: Tensor, steps: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the gradient of g.

    Args:
        dprefix, dsuffix: gradients of the logarithms of the whole chunk's decays; overwritten.
        steps: of those of `upto` and `since` at each step of the walk.
    """
    for half, (dupto, dsince) in reversed(list(zip(halves(dprefix.shape[-2]), steps, strict=True))):
        first, second, ahead = early(dprefix, half), late(dprefix, half), early(dsuffix, half)
        first[..., -1, :] += second.sum(-2)
        second[..., -1, :] += ahead.sum(-2)
        second += dsince
        ahead += dupto
    return dprefix


def halves(size: int) -> list[int]:
    """Return 1, 2, 4, ... below `size`."""
    return [1 << i for i in range(size.bit_length() - 1)]


def early(x: Tensor, half: int) -> Tensor:
    """Return the first halves of the blocks of `2 half` tokens of `[..., C, D]`: `[..., blocks, half, D]`, a view."""
    return x.unflatten(-2, (-1, 2, half))[..., 0, :, :]


def late(x: Tensor, half: int) -> Tensor:
    """Return the second halves."""
    return x.unflatten(-2, (-1, 2, half))[..., 1, :, :]


def corners(x: Tensor, half: int) -> Tensor:
    """Return late rows and early columns of the blocks of `[..., C, C]`: `[..., blocks, half, half]`, a view."""
    blocks = x.unflatten(-1, (-1, 2 * half)).unflatten(-3, (-1, 2 * half))  # [..., blocks, 2h, blocks, 2h]
    return blocks.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)[..., half:, :half]
