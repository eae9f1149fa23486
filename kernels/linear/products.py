"""Products of queries and keys that decay on the way, A_ij = sum_d q_id k_jd exp(g_{j+1,d} + ... + g_{i,d}) for j <= i.

Several `rows` may share the keys: the delta rule wants the products of keys with keys too. Gradients of the gates come
from the pairs that a gate lies between, and from no others that would have to cancel. Gates of -inf are like others.

Both Functions take log decays `[..., C, D]`, C a power of 2, keys and rows `[..., C, K]`. They return what decays up to
each token, by its own gate too, and what decays after it, `[..., C, D]`; and the products, lower triangular
`[..., C, C]`.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longctx.kernels.linear.spans import Spans, corners, early, halves, late, spans_gradient


class ScalarProducts(torch.autograd.Function):
    """D = 1: gates are the same for all dims."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, k: Tensor, *rows: Tensor) -> tuple[Tensor, ...]:
        """Return the decays and the products."""
        size = g.shape[-2]
        within = torch.eye(size, dtype=g.dtype, device=g.device).expand(*g.shape[:-1], size).contiguous()
        spans = Spans(g)
        for half, upto, since in spans:
            torch.mul(since, upto.mT, out=corners(within, half))
        products = [(row @ k.mT).mul_(within) for row in rows]
        ctx.save_for_backward(spans.prefix, spans.suffix, within, k, *rows, *products)
        return spans.prefix, spans.suffix, *products

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dprefix: Tensor, dsuffix: Tensor, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients."""
        prefix, suffix, within, k, *saved = ctx.saved_tensors
        rows, products = saved[: len(grads)], saved[len(grads) :]
        dwithin = grads[0] * products[0]  # of its logarithm
        for grad, product in zip(grads[1:], products[1:], strict=True):
            dwithin.addcmul_(grad, product)
        steps = []
        for half in halves(k.shape[-2]):
            corner = corners(dwithin, half)
            steps.append((corner.sum(-2)[..., None], corner.sum(-1, keepdim=True)))
        dg = spans_gradient(dprefix * prefix, dsuffix * suffix, steps)
        plain = [grad * within for grad in grads]
        dk = plain[0].mT @ rows[0]
        for grad, row in zip(plain[1:], rows[1:], strict=True):
            dk += grad.mT @ row
        return dg, dk, *(grad @ k for grad in plain)


class DiagonalProducts(torch.autograd.Function):
    """D = K: decays stay inside of the sum over d; rows decay from the middles of blocks, keys up to them."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, k: Tensor, *rows: Tensor) -> tuple[Tensor, ...]:
        """Return the decays and the products."""
        products = [torch.diag_embed((row * k).sum(-1)) for row in rows]
        spans = Spans(g)
        for half, upto, since in spans:
            keys = early(k, half) * upto
            for row, product in zip(rows, products, strict=True):
                corners(product, half).copy_((late(row, half) * since) @ keys.mT)
        ctx.save_for_backward(spans.prefix, spans.suffix, g, k, *rows)
        return spans.prefix, spans.suffix, *products

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dprefix: Tensor, dsuffix: Tensor, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients."""
        prefix, suffix, g, k, *rows = ctx.saved_tensors
        diagonals = [grad.diagonal(dim1=-2, dim2=-1)[..., None] for grad in grads]
        drows = [diagonal * k for diagonal in diagonals]
        dk = diagonals[0] * rows[0]
        for diagonal, row in zip(diagonals[1:], rows[1:], strict=True):
            dk.addcmul_(diagonal, row)
        steps = []
        for half, upto, since in Spans(g):
            keys = early(k, half) * upto
            dkeys, dsince = torch.zeros_like(keys), torch.zeros_like(keys)
            for row, drow, grad in zip(rows, drows, grads, strict=True):
                corner, decayed = corners(grad, half), late(row, half) * since
                ddecayed = _combined(corner, keys)
                dkeys += _combined(corner.mT, decayed)
                dsince.addcmul_(decayed, ddecayed)
                late(drow, half).addcmul_(ddecayed, since)
            early(dk, half).addcmul_(dkeys, upto)
            steps.append((keys.mul_(dkeys), dsince))
        return spans_gradient(dprefix * prefix, dsuffix * suffix, steps), dk, *drows


def _combined(weights: Tensor, x: Tensor) -> Tensor:
    """Return `weights [..., h, h] @ x [..., h, K]`; libraries are slow at products of 1 and 2."""
    if weights.shape[-1] > 2:
        return weights @ x
    total = weights[..., :1] * x[..., :1, :]
    return total.addcmul_(weights[..., 1:], x[..., 1:, :]) if weights.shape[-1] == 2 else total
