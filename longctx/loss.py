"""Next-token loss as a sum and a count, never as a mean: shards have different numbers of labels, some have none."""

import torch.nn.functional as F
from torch import Tensor

from longctx import liger

IGNORED = -100


def token_loss_sum(logits: Tensor, labels: Tensor, *, ops: str = "torch") -> Tensor:
    """Sum the cross-entropy of all labels that are not ignored.

    Args:
        logits: `[B, T, V]`, any float dtype; the softmax is computed in float32 (float64 for float64).
        labels: int64 `[B, T]`; `IGNORED` does not count. Already shifted: label i belongs to logits i.
        ops: `torch`, or `liger` for its fused kernel, which overwrites the logits.

    Returns:
        A scalar; 0 with zero gradients where nothing counts.
    """
    logits = logits.flatten(0, 1)
    if logits.dtype.itemsize < 4:
        logits = logits.float()
    if ops == "liger":
        return liger.loss_sum(logits, labels.flatten(), ignored=IGNORED)
    return F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORED, reduction="sum")
