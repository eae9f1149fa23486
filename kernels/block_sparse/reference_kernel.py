"""Selected attention as the formulas read, behind the kernel contract: dense, for tests and short sequences."""

import torch
from torch import Tensor

from longctx.kernels.block_sparse.contract import Weights
from longctx.kernels.block_sparse.reference import selected_attention, selected_sum
from longctx.kernels.block_sparse.selection import Selection
from longctx.kernels.contract import Request, Scores
from longctx.kernels.merge import Partial, accumulator_dtype, merge_into


class ReferenceSparseKernel:
    """Evaluate the selection for every pair of a query and a key at hand; gradients are autograd's."""

    name = "reference"

    def unsupported(self, request: Request, weights: Weights) -> str | None:
        """Serve everything."""
        return None

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        selection: Selection,
        k_positions: Tensor,
        weights: Weights,
        gates: Tensor | None,
        scores: Scores,
        partial: Partial,
    ) -> None:
        """Merge into `partial`; see the contract."""
        inputs = _wide(q, k, v, gates)
        out, lse = _attend(inputs, selection=selection, k_positions=k_positions, weights=weights, scores=scores)
        if lse is None:
            partial.out += out
        else:
            merge_into(partial, out, lse)

    def backward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        selection: Selection,
        k_positions: Tensor,
        weights: Weights,
        gates: Tensor | None,
        scores: Scores,
        dout: Tensor,
        delta: Tensor,
        lse: Tensor,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
        dgates: Tensor | None,
    ) -> None:
        """Add to `dq, dk, dv, dgates`; see the contract.

        These keys' out and lse enter the whole as `w out + ...` with `w = exp(lse - lse of all)`. Hence d(out) =
        `w dout` and d(lse) = `w (rowsum(dout out) - delta)`; the rest is autograd's.
        """
        inputs = [x.requires_grad_() for x in _wide(q, k, v, gates)]
        with torch.enable_grad():
            out, own = _attend(inputs, selection=selection, k_positions=k_positions, weights=weights, scores=scores)
        dout = dout.to(out.dtype)
        if own is None:
            grads = torch.autograd.grad(out, inputs, dout)
        else:
            weight = torch.exp(own.detach() - lse).masked_fill(torch.isneginf(own), 0.0)  # [B, H, T]
            dlse = weight * ((dout * out.detach()).sum(-1).transpose(1, 2) - delta)
            douts = (weight.transpose(1, 2)[..., None] * dout, dlse)
            grads = torch.autograd.grad((out, own), inputs, douts)
        for total, grad in zip((dq, dk, dv, dgates), grads, strict=False):
            assert total is not None
            total += grad


def _wide(*tensors: Tensor | None) -> list[Tensor]:
    """Return those that are there as leaves in the accumulators' dtype."""
    return [x.detach().to(accumulator_dtype(x.dtype)) for x in tensors if x is not None]


def _attend(
    inputs: list[Tensor], *, selection: Selection, k_positions: Tensor, weights: Weights, scores: Scores
) -> tuple[Tensor, Tensor | None]:
    """Return out `[B, T, H, Dv]` and lse `[B, H, T]` of q, k, v (and gates); weights `sum` have no lse."""
    q, k, v, *gates = inputs
    assert len(gates) == (weights == "gated"), "gates are given if and only if they are the weights"
    if weights == "sum":
        assert scores.softcap is None, "products are not capped"
        return selected_sum(q * scores.softmax_scale, k, v, selection=selection, k_positions=k_positions), None
    return selected_attention(
        *(q, k, v),
        selection=selection,
        k_positions=k_positions,
        gates=gates[0] if gates else None,
        softmax_scale=scores.softmax_scale,
        softcap=scores.softcap,
    )
