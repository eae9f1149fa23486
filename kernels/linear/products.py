"""Products of queries and keys that decay on the way, A_ij = sum_d q_id k_jd exp(G_id - G_jd) for j <= i.

Both Functions make their decays again in the backward, and share what makes the gradient of G cheap: G_i meets only q_i
and -G_j only k_j, so

    dG = q * dq - k * dk

whatever lies between; nothing goes back through an exponential. Several `rows` may share the keys: the delta rule wants
the products of keys with keys too. The gradients of G, of the keys and of the rows come in this order.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class ScalarProducts(torch.autograd.Function):
    """G is the same for all dims: `[..., C]`."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, k: Tensor, *rows: Tensor) -> tuple[Tensor, ...]:
        """Take G `[..., C]`, keys and rows `[..., C, K]`; return lower triangular `[..., C, C]`."""
        within = _within(total)
        ctx.save_for_backward(within, k, *rows)
        return tuple((row @ k.mT).mul_(within) for row in rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        """Return the gradients."""
        within, k, *rows = ctx.saved_tensors
        plain = [grad * within for grad in grads]
        drows = [grad @ k for grad in plain]
        dk = sum(grad.mT @ row for grad, row in zip(plain, rows, strict=True))
        return _dtotal(k, dk, rows, drows).sum(-1), dk, *drows


class DiagonalProducts(torch.autograd.Function):
    """G differs by dim, `[..., C, K]`, so decays cannot leave the sum over d; halving keeps their exponents <= 0.

    In a block of 2h tokens, the products of the later h rows with the earlier h keys are those of rows that decay from
    the middle and keys that decay up to it. Its halves go the same way, down to single tokens, which do not decay.
    """

    @staticmethod
    def forward(ctx: Any, total: Tensor, k: Tensor, *rows: Tensor) -> tuple[Tensor, ...]:
        """Take G, keys and rows, all `[..., C, K]` with C a power of 2; return lower triangular `[..., C, C]`."""
        size = k.shape[-2]
        products = tuple(torch.diag_embed((row * k).sum(-1)) for row in rows)
        for half in _halves(size):
            upto, since = _from_middle(total, half)
            keys = _early(k, half) * upto
            for row, product in zip(rows, products, strict=True):
                _corners(product, half).copy_((_late(row, half) * since) @ keys.mT)
        ctx.save_for_backward(total, k, *rows)
        return products

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        """Return the gradients."""
        total, k, *rows = ctx.saved_tensors
        dk, drows = torch.zeros_like(k), [torch.zeros_like(row) for row in rows]
        for half in _halves(k.shape[-2]):
            upto, since = _from_middle(total, half)
            keys = _early(k, half) * upto
            for row, drow, grad in zip(rows, drows, grads, strict=True):
                corners = _corners(grad, half).contiguous()
                _late(drow, half).addcmul_(corners @ keys, since)
                _early(dk, half).addcmul_(corners.mT @ (_late(row, half) * since), upto)
        dtotal = _dtotal(k, dk, rows, drows)
        for row, drow, grad in zip(rows, drows, grads, strict=True):
            diagonal = grad.diagonal(dim1=-2, dim2=-1)[..., None]
            drow.addcmul_(diagonal, k)
            dk.addcmul_(diagonal, row)
        return dtotal, dk, *drows


def _within(total: Tensor) -> Tensor:
    """Return exp(G_i - G_j) for j <= i, else 0, `[..., C, C]`."""
    size = total.shape[-1]
    above = total.new_full((size, size), float("-inf")).triu(1)
    return (above + total[..., :, None]).sub_(total[..., None, :]).exp_()


def _dtotal(k: Tensor, dk: Tensor, rows: list[Tensor], drows: list[Tensor]) -> Tensor:
    dtotal = (k * dk).neg_()
    for row, drow in zip(rows, drows, strict=True):
        dtotal.addcmul_(row, drow)
    return dtotal


def _halves(size: int) -> list[int]:
    """Return 1, 2, 4, ... below `size`."""
    return [1 << i for i in range(size.bit_length() - 1)]


def _early(x: Tensor, half: int) -> Tensor:
    """Return the first halves of the blocks, `[..., blocks, half, K]`, a view."""
    return x.unflatten(-2, (-1, 2, half))[..., 0, :, :]


def _late(x: Tensor, half: int) -> Tensor:
    """Return the second halves."""
    return x.unflatten(-2, (-1, 2, half))[..., 1, :, :]


def _from_middle(total: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """Return the decays of each block from its early tokens up to its middle, and from there to its late tokens."""
    early, late = _early(total, half), _late(total, half)
    middle = early[..., -1:, :]
    return (middle - early).exp_(), (late - middle).exp_()


def _corners(products: Tensor, half: int) -> Tensor:
    """Return the products of late rows with early keys, `[..., blocks, half, half]`, a view."""
    blocks = products.unflatten(-1, (-1, 2 * half)).unflatten(-3, (-1, 2 * half))  # [..., blocks, 2h, blocks, 2h]
    return blocks.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)[..., half:, :half]
