"""A learned sink: one more key in every row's softmax, with a score of its own and value 0 (gpt-oss, 2508.10925)."""

import torch
from torch import Tensor

from longctx.kernels.merge import Partial


def join_sink(partial: Partial, sink: Tensor) -> None:
    """Merge `(0, sink)` into every row, in place: a key with score `sink [H]` and value 0."""
    total = torch.logaddexp(partial.lse, sink[:, None].expand_as(partial.lse))
    weight = torch.exp(partial.lse - total).masked_fill_(torch.isneginf(total), 0.0)  # nothing seen, and no sink
    partial.out.mul_(weight.transpose(1, 2).unsqueeze(-1))
    partial.lse.copy_(total)


def sink_gradient(sink: Tensor, *, lse: Tensor, delta: Tensor) -> Tensor:
    """Return d(sink) `[H]` of these rows: `ds = p (0 - delta)`, where the sink has weight `exp(sink - lse)`.

    Args:
        lse: `[B, H, T]`, the sink included; delta: `[B, H, T]`.
    """
    weights = torch.exp(sink[:, None] - lse).masked_fill_(torch.isneginf(lse), 0.0)
    return -(weights * delta).sum(dim=(0, 2))
