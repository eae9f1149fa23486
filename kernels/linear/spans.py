"""Sums of log decays over spans of a chunk, none of which is a difference of two others.

G_i - G_j from running sums G would lose the digits of a weak gate next to a strong one: after a gate of -1e3 a float32
knows the sum to 6e-5 only. Here every sum is of its own terms, all of one sign, and so exact to the last digits.
Halving makes it cheap: a span from key j to query i crosses the middle of exactly one block of 2, 4, 8 ... tokens, and

    g_{j+1} + ... + g_i = upto_j + since_i

with `upto` the sum from the key's next token to the middle, `since` from there on to the query.
"""

from collections.abc import Iterator

import torch
from torch import Tensor


class Spans:
    """The sums for `g [..., C, D]`, C a power of 2; walk through it, and it knows those of the whole chunk.

    Attributes:
        prefix: `[..., C, D]` after the walk, the sum of a token's gate and those before it.
        suffix: `[..., C, D]` after the walk, the sum of the gates after a token.
    """

    def __init__(self, g: Tensor) -> None:
        self.prefix, self.suffix = g.clone(memory_format=torch.contiguous_format), torch.zeros_like(g)

    def __iter__(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield half = 1, 2, 4 ... with `upto` and `since`, `[..., blocks, half, D]`; the next step changes them."""
        for half in halves(self.prefix.shape[-2]):
            first, second, ahead = early(self.prefix, half), late(self.prefix, half), early(self.suffix, half)
            yield half, ahead, second
            ahead += second[..., -1:, :]
            second += first[..., -1:, :]


def spans_gradient(dprefix: Tensor, dsuffix: Tensor, steps: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the gradient of g.

    Args:
        dprefix, dsuffix: gradients of the whole chunk's sums; overwritten.
        steps: of `upto` and `since` at each step of the walk.
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
