"""The learned feature map of Hedgehog (arXiv 2402.04347)."""

import torch
from torch import Tensor, nn

from longctx.kernels.linear.maps.base import FeatureMap, Side
from longctx.kernels.merge import accumulator_dtype


class Hedgehog(FeatureMap):
    """[softmax(W x), softmax(-W x)], W learned per head, for queries and keys apart, from the identity on.

    Trained to mimic softmax attention by `distill.py`, or with everything else.

    Args:
        head_dim: D.
        heads: H.
    """

    name = "hedgehog"
    normaliser = "sum"

    def __init__(self, *, head_dim: int, heads: int) -> None:
        super().__init__()
        self.query_weight = nn.Parameter(torch.empty(heads, head_dim, head_dim))
        self.key_weight = nn.Parameter(torch.empty(heads, head_dim, head_dim))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Begin with the identity."""
        for weight in self.parameters():
            weight.copy_(torch.eye(weight.shape[-1], dtype=weight.dtype, device=weight.device).expand_as(weight))

    def features(self, head_dim: int) -> int:
        """Return twice the head dim."""
        return 2 * head_dim

    def forward(self, x: Tensor, *, positions: Tensor, side: Side) -> Tensor:
        """Return the features; for each token they sum to 2."""
        weight = self.query_weight if side == "q" else self.key_weight
        wide = torch.einsum("bthd,hed->bthe", x, weight.to(x.dtype)).to(accumulator_dtype(x.dtype))
        return torch.cat([torch.softmax(wide, dim=-1), torch.softmax(-wide, dim=-1)], dim=-1).to(x.dtype)
