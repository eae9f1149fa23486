"""Hedgehog's distillation: teach a feature map to weigh keys as softmax attention does (arXiv 2402.04347)."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longctx.kernels.linear.maps.base import FeatureMap
from longctx.kernels.merge import accumulator_dtype


def distillation_loss(
    feature_map: FeatureMap,
    q: Tensor,
    k: Tensor,
    *,
    positions: Tensor,
    documents: Tensor | None = None,
    scale: float | None = None,
    block_size: int = 256,
) -> Tensor:
    """Return the cross entropy of the feature map's weights under those of softmax attention, causal, in nats.

        - sum_s softmax_s(scale q_t.k_s) log( phi(q_t).phi(k_s) / sum_r phi(q_t).phi(k_r) ),   s, r <= t

    averaged over batch, heads and tokens t. It is at least the entropy of the softmax weights. Weights are held for
    `block_size` queries at a time. The gradient goes through the feature map alone: softmax attention is the teacher.

    Args:
        feature_map: one that divides by the sum of its weights.
        q, k: `[B, T, H, D]`.
        positions: int64 `[T]`.
        documents: integers `[R, T]`, R = 1 or B: tokens see those of the same number only. None = one document.
        scale: of the softmax; default `D ** -0.5`.
        block_size: queries whose weights are in memory at once: O(B H T block_size).

    Returns:
        a scalar, float32 (float64 for float64 inputs).

    Raises:
        ValueError: a feature map without a sum of weights.
    """
    if feature_map.normaliser != "sum":
        raise ValueError(
            f"distillation compares weights that sum to 1; those of the feature map {feature_map.name} need not"
        )
    wide = accumulator_dtype(q.dtype)
    phi_q = feature_map(q, positions=positions, side="q").to(wide).transpose(1, 2)
    phi_k = feature_map(k, positions=positions, side="k").to(wide).transpose(1, 2)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    teacher = (q.detach().to(wide).transpose(1, 2) * scale, k.detach().to(wide).transpose(1, 2))
    total = _CrossEntropy.apply(phi_q, phi_k, *teacher, documents, block_size)  # type: ignore[no-untyped-call]
    return total / phi_q[..., 0].numel()


class _CrossEntropy(torch.autograd.Function):
    """The sum over all queries; its gradients are made beside it, while a block's weights are there."""

    @staticmethod
    def forward(
        ctx: Any, phi_q: Tensor, phi_k: Tensor, q: Tensor, k: Tensor, documents: Tensor | None, block_size: int
    ) -> Tensor:
        tiny = torch.finfo(phi_q.dtype).tiny
        total = phi_q.new_zeros(())
        dq, dk = torch.empty_like(phi_q), torch.zeros_like(phi_k)
        for begin in range(0, q.shape[2], block_size):
            end = min(begin + block_size, q.shape[2])
            hidden = ~_visible(begin, end, documents, q.device)  # [R, 1, n, end]
            scores = (q[:, :, begin:end] @ k[:, :, :end].mT).masked_fill(hidden, -torch.inf)
            teacher = torch.softmax(scores, dim=-1)
            weights = (phi_q[:, :, begin:end] @ phi_k[:, :, :end].mT).masked_fill(hidden, 0.0)
            sums = weights.sum(-1, keepdim=True).clamp(min=tiny)
            positive = weights >= tiny  # smaller ones count as the smallest normal number: finite, without a gradient
            floored = torch.where(positive, weights, tiny)
            total -= (teacher * (floored.log() - sums.log())).sum()
            slope = (1 / sums - torch.where(positive, teacher / floored, 0.0)).masked_fill(hidden, 0.0)
            dq[:, :, begin:end] = slope @ phi_k[:, :, :end]
            dk[:, :, :end] += slope.mT @ phi_q[:, :, begin:end]
        ctx.save_for_backward(dq, dk)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtotal: Tensor) -> tuple[Tensor | None, ...]:
        dq, dk = ctx.saved_tensors
        return dtotal * dq, dtotal * dk, None, None, None, None


def _visible(begin: int, end: int, documents: Tensor | None, device: torch.device) -> Tensor:
    """Return which keys before `end` the queries from `begin` see, bool `[R, 1, end - begin, end]`."""
    at = torch.arange(end, device=device)
    visible = (at[begin:, None] >= at)[None]
    if documents is not None:
        visible = visible & (documents[:, begin:end, None] == documents[:, None, :end])
    return visible[:, None]
