"""Softmax attention as the formulas read: the yardstick for every other kernel, on any device, without any tricks."""

from collections.abc import Sequence

import torch
from torch import Tensor

from longctx.kernels.contract import Request, Scores
from longctx.kernels.merge import Partial, accumulator_dtype, merge_into
from longctx.kernels.positions import Tile
from longctx.kernels.softmax.by_lists import ByLists
from longctx.kernels.tiles import visible


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    allowed: Tensor,
    softmax_scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute softmax(softcap(scale * q k^T), masked) v densely, differentiable by autograd.

    Args:
        q: `[B, Tq, H, D]`; k: `[B, Tk, HK, D]`; v: `[B, Tk, HK, Dv]`. Computed in the dtype given: the caller upcasts.
        allowed: bool `[Tq, Tk]`, or `[H, Tq, Tk]` for a mask per head.
        softmax_scale: default `D ** -0.5`.
        softcap: c of `c tanh(s / c)`; None = none.
        sink_logits: `[H]`; joins every row's denominator and nothing else, as one more key whose value is 0 would. It
            is not capped (as in gpt-oss, arXiv 2508.10925).

    Returns:
        out `[B, Tq, H, Dv]` and lse `[B, H, Tq]`, the sink included. A row with nothing to see has out 0 and zero
        gradients, and lse -inf, or the sink logit where there is one.
    """
    group = q.shape[2] // k.shape[2]
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(group, dim=2)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~allowed, float("-inf"))
    blind = ~allowed.any(dim=-1)
    lse = torch.logsumexp(scores.masked_fill(blind[..., None], 0.0), dim=-1).masked_fill(blind, float("-inf"))
    if sink_logits is not None:
        lse = torch.logaddexp(lse, sink_logits[:, None])
    weights = torch.exp(scores - lse.masked_fill(torch.isneginf(lse), 0.0)[..., None])
    out = torch.einsum("bhqk,bkhd->bqhd", weights, v.repeat_interleave(group, dim=2))
    return out, lse


class ReferenceKernel(ByLists):
    """Tile by tile with the whole score matrix of a tile in memory: for tests and for what nothing else serves."""

    name = "reference"

    def unsupported(self, request: Request) -> str | None:
        return None

    def _forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, tiles: Sequence[Tile], scores: Scores, partial: Partial
    ) -> None:
        wide = accumulator_dtype(q.dtype)
        for tile in tiles:
            rows, columns = tile.rows, tile.columns
            out, lse = dense_attention(
                q[:, rows].to(wide),
                k[:, columns].to(wide),
                v[:, columns].to(wide),
                allowed=visible(tile, device=q.device),
                softmax_scale=scores.softmax_scale,
                softcap=scores.softcap,
            )
            merge_into(Partial(partial.out[:, rows], partial.lse[:, :, rows]), out, lse)

    def _backward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        tiles: Sequence[Tile],
        scores: Scores,
        dout: Tensor,
        delta: Tensor,
        lse: Tensor,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
    ) -> None:
        """Apply FlashAttention's backward (arXiv 2205.14135, appendix B) with the merged lse.

        p = exp(s - lse), dv = p^T dout, ds = p * (dout v^T - delta), delta = rowsum(dout * out); the derivative of
        the cap is 1 - (s / c)^2 with the capped s.
        """
        wide = accumulator_dtype(q.dtype)
        group = q.shape[2] // k.shape[2]
        scale, cap = scores.softmax_scale, scores.softcap
        for tile in tiles:
            rows, columns = tile.rows, tile.columns
            q_tile, dout_tile = q[:, rows].to(wide), dout[:, rows].to(wide)
            k_tile = k[:, columns].to(wide).repeat_interleave(group, dim=2)
            v_tile = v[:, columns].to(wide).repeat_interleave(group, dim=2)
            s = torch.einsum("bqhd,bkhd->bhqk", q_tile, k_tile) * scale
            if cap is not None:
                s = cap * torch.tanh(s / cap)
            weights = torch.exp(s - lse[:, :, rows, None]).masked_fill(~visible(tile, device=q.device), 0.0)
            dweights = torch.einsum("bqhd,bkhd->bhqk", dout_tile, v_tile)
            ds = weights * (dweights - delta[:, :, rows, None]) * scale
            if cap is not None:
                ds *= 1 - (s / cap) ** 2
            dq[:, rows] += torch.einsum("bhqk,bkhd->bqhd", ds, k_tile)
            dk[:, columns] += _sum_groups(torch.einsum("bhqk,bqhd->bkhd", ds, q_tile), group)
            dv[:, columns] += _sum_groups(torch.einsum("bhqk,bqhd->bkhd", weights, dout_tile), group)


def _sum_groups(grad: Tensor, group: int) -> Tensor:
    """Sum the query heads of each KV head: `[B, T, H, D]` -> `[B, T, HK, D]`."""
    return grad.unflatten(2, (-1, group)).sum(3)
