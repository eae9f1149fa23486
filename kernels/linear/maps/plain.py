"""Feature maps without weights, positions or randomness."""

import torch
import torch.nn.functional as F
from torch import Tensor

from longctx.kernels.linear.maps.base import FeatureMap, Side
from longctx.kernels.merge import accumulator_dtype

L2_EPS = 1e-6  # under the root: a vector of zeros stays one, and its gradient finite


class Identity(FeatureMap):
    """x: whatever keeps the scale of the output is elsewhere, such as a norm (TransNormer, arXiv 2210.10340)."""

    name = "identity"
    normaliser = "none"

    def forward(self, x: Tensor, *, positions: Tensor, side: Side) -> Tensor:
        """Return x."""
        return x


class Silu(FeatureMap):
    """x sigmoid(x), as in lightning attention (arXiv 2405.17381)."""

    name = "silu"
    normaliser = "none"

    def forward(self, x: Tensor, *, positions: Tensor, side: Side) -> Tensor:
        """Return x sigmoid(x)."""
        return F.silu(x)


class Elu1(FeatureMap):
    """elu(x) + 1 (arXiv 2006.16236): 1 + x above 0, e^x below."""

    name = "elu1"
    normaliser = "sum"

    def forward(self, x: Tensor, *, positions: Tensor, side: Side) -> Tensor:
        """Return elu(x) + 1, without the sum in which a small e^x - 1 + 1 would be lost."""
        wide = x.to(accumulator_dtype(x.dtype))
        return torch.where(wide > 0, wide + 1, torch.exp(wide.clamp(max=0))).to(x.dtype)


class Relu(FeatureMap):
    """max(x, 0) (arXiv 2103.13076, without its learned projection)."""

    name = "relu"
    normaliser = "sum"

    def forward(self, x: Tensor, *, positions: Tensor, side: Side) -> Tensor:
        """Return max(x, 0)."""
        return F.relu(x)


class L2(FeatureMap):
    """x / |x|, for delta rules: I - beta k k^T shrinks nothing below 0 nor lets it grow (arXiv 2406.06484)."""

    name = "l2"
    normaliser = "none"

    def forward(self, x: Tensor, *, positions: Tensor, side: Side) -> Tensor:
        """Return x / sqrt(|x|^2 + 1e-6)."""
        wide = x.to(accumulator_dtype(x.dtype))
        return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + L2_EPS)).to(x.dtype)
