"""Products of queries and keys that decay on the way, A_ij = sum_d q_id k_jd exp(g_{j+1,d} + ... + g_{i,d}) for j <= i.

Several `rows` may share the keys: the delta rule wants the products of keys with keys too. Gradients of the gates come
from the pairs that a gate lies between, and from no others that would have to cancel. Gates of -inf are like others.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longctx.kernels.linear.factors import factors
from longctx.kernels.linear.spans import Spans, corners, early, halves, late, spans_gradient


class ScalarProducts(torch.autograd.Function):
    """Gates are the same for all dims."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, k: Tensor, *rows: Tensor) -> tuple[Tensor, ...]:
        """Take gates `[..., C, 1]`, C a power of 2, keys and rows `[..., C, K]`.

        Returns:
            The gates' sums up to each token, its own included, and after it, `[..., C, 1]`; the products `[..., C, C]`.
        """
        size = g.shape[-2]
        sums = g.new_full((size, size), float("-inf")).triu(1).expand(*g.shape[:-1], size).contiguous()
        spans = Spans(g)
        for half, upto, since in spans:
            torch.add(since, upto.mT, out=corners(sums, half))
        within = factors(sums)
        products = [(row @ k.mT).mul_(within) for row in rows]
        ctx.save_for_backward(within, k, *rows, *products)
        return spans.prefix, spans.suffix, *products

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dprefix: Tensor, dsuffix: Tensor, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients."""
        within, k, *saved = ctx.saved_tensors
        rows, products = saved[: len(grads)], saved[len(grads) :]
        dsums = grads[0] * products[0]
        for grad, product in zip(grads[1:], products[1:], strict=True):
            dsums.addcmul_(grad, product)
        steps = []
        for half in halves(k.shape[-2]):
            corner = corners(dsums, half)
            steps.append((corner.sum(-2)[..., None], corner.sum(-1, keepdim=True)))
        dg = spans_gradient(dprefix.clone(), dsuffix.clone(), steps)
        plain = [grad * within for grad in grads]
        dk = plain[0].mT @ rows[0]
        for grad, row in zip(plain[1:], rows[1:], strict=True):
            dk += grad.mT @ row
        return dg, dk, *(grad @ k for grad in plain)


class DiagonalProducts(torch.autograd.Function):
    """Gates differ by dim and stay inside of the sum over d: rows decay from the middles of blocks, keys up to them."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, k: Tensor, *rows: Tensor) -> tuple[Tensor, ...]:
        """Take gates, keys and rows, all `[..., C, K]`; return as `ScalarProducts`, sums `[..., C, K]`."""
        products = [torch.diag_embed((row * k).sum(-1)) for row in rows]
        spans = Spans(g)
        for half, upto, since in spans:
            keys, decay = early(k, half) * factors(upto), factors(since)
            for row, product in zip(rows, products, strict=True):
                corners(product, half).copy_((late(row, half) * decay) @ keys.mT)
        ctx.save_for_backward(g, k, *rows)
        return spans.prefix, spans.suffix, *products

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dprefix: Tensor, dsuffix: Tensor, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients."""
        g, k, *rows = ctx.saved_tensors
        dk, drows = torch.zeros_like(k), [torch.zeros_like(row) for row in rows]
        for row, drow, grad in zip(rows, drows, grads, strict=True):
            diagonal = grad.diagonal(dim1=-2, dim2=-1)[..., None]
            drow.addcmul_(diagonal, k)
            dk.addcmul_(diagonal, row)
        steps = []
        for half, upto, since in Spans(g):
            upto, decay = factors(upto), factors(since)
            keys = early(k, half) * upto
            dkeys, dsince = torch.zeros_like(keys), torch.zeros_like(keys)
            for row, drow, grad in zip(rows, drows, grads, strict=True):
                corner, decayed = corners(grad, half).contiguous(), late(row, half) * decay
                drow_decayed = corner @ keys
                dkeys += corner.mT @ decayed
                dsince.addcmul_(decayed, drow_decayed)
                late(drow, half).addcmul_(drow_decayed, decay)
            early(dk, half).addcmul_(dkeys, upto)
            steps.append((keys.mul_(dkeys), dsince))
        return spans_gradient(dprefix.clone(), dsuffix.clone(), steps), dk, *drows
