"""Softmax attention as the formulas read: the yardstick for every other kernel, on any device, without any tricks."""

from collections.abc import Sequence

import torch
from torch import Tensor

from longctx.kernels.contract import Request
from longctx.kernels.merge import Partial, accumulator_dtype, merge_into
from longctx.kernels.positions import Tile


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, *, allowed: Tensor, softmax_scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Compute softmax(scale * q k^T, masked) v densely, differentiable by autograd.

    Args:
        q: `[B, Tq, H, D]`; k, v: `[B, Tk, HK, D]`. Computed in the dtype given, so the caller upcasts.
        allowed: bool `[Tq, Tk]`.
        softmax_scale: default `D ** -0.5`.

    Returns:
        out `[B, Tq, H, D]` and lse `[B, H, Tq]`; a row with nothing to see has out 0, lse -inf and zero gradients.
    """
    group = q.shape[2] // k.shape[2]
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(group, dim=2)) * scale
    scores = scores.masked_fill(~allowed, float("-inf"))
    sees_something = allowed.any(dim=-1)
    lse = torch.logsumexp(scores.masked_fill(~sees_something[:, None], 0.0), dim=-1)
    weights = torch.exp(scores - lse[..., None])
    out = torch.einsum("bhqk,bkhd->bqhd", weights, v.repeat_interleave(group, dim=2))
    return out, lse.masked_fill(~sees_something, float("-inf"))


class ReferenceKernel:
    """Tile by tile with the whole score matrix of a tile in memory: for tests and for what nothing else serves."""

    name = "reference"

    def unsupported(self, request: Request) -> str | None:
        return None

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, tiles: Sequence[Tile], softmax_scale: float, partial: Partial
    ) -> None:
        for tile in tiles:
            rows, columns = tile.rows, tile.columns
            allowed = _band(tile, q.device)
            wide = accumulator_dtype(q.dtype)
            out, lse = dense_attention(
                q[:, rows].to(wide),
                k[:, columns].to(wide),
                v[:, columns].to(wide),
                allowed=allowed,
                softmax_scale=softmax_scale,
            )
            merge_into(Partial(partial.out[:, rows], partial.lse[:, :, rows]), out, lse)

    def backward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        tiles: Sequence[Tile],
        softmax_scale: float,
        dout: Tensor,
        out: Tensor,
        lse: Tensor,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
    ) -> None:
        """Apply FlashAttention's backward (arXiv 2205.14135, appendix B) with the merged lse.

        p = exp(s - lse), dv = p^T dout, ds = p * (dout v^T - delta), delta = rowsum(dout * out).
        """
        wide = accumulator_dtype(q.dtype)
        group = q.shape[2] // k.shape[2]
        delta = (dout.to(wide) * out.to(wide)).sum(-1).transpose(1, 2)  # [B, H, Tq]
        for tile in tiles:
            rows, columns = tile.rows, tile.columns
            q_tile, dout_tile = q[:, rows].to(wide), dout[:, rows].to(wide)
            k_tile = k[:, columns].to(wide).repeat_interleave(group, dim=2)
            v_tile = v[:, columns].to(wide).repeat_interleave(group, dim=2)
            scores = torch.einsum("bqhd,bkhd->bhqk", q_tile, k_tile) * softmax_scale
            weights = torch.exp(scores - lse[:, :, rows, None]).masked_fill(~_band(tile, q.device), 0.0)
            dweights = torch.einsum("bqhd,bkhd->bhqk", dout_tile, v_tile)
            dscores = weights * (dweights - delta[:, :, rows, None]) * softmax_scale
            dq[:, rows] += torch.einsum("bhqk,bkhd->bqhd", dscores, k_tile)
            dk[:, columns] += _sum_groups(torch.einsum("bhqk,bqhd->bkhd", dscores, q_tile), group)
            dv[:, columns] += _sum_groups(torch.einsum("bhqk,bqhd->bkhd", weights, dout_tile), group)


def _sum_groups(grad: Tensor, group: int) -> Tensor:
    """Sum the query heads of each KV head: `[B, T, H, D]` -> `[B, T, HK, D]`."""
    return grad.unflatten(2, (-1, group)).sum(3)


def _band(tile: Tile, device: torch.device) -> Tensor:
    """Return the tile's visible pairs, bool `[q_count, k_count]`."""
    i = torch.arange(tile.q_count, device=device)[:, None]
    j = torch.arange(tile.k_count, device=device)[None, :]
    return (j - i >= tile.lo) & (j - i <= tile.hi)
