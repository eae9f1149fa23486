"""The feature map of cosFormer (arXiv 2202.08791)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from longctx.kernels.linear.maps.base import FeatureMap, Side
from longctx.kernels.merge import accumulator_dtype


class Cosformer(FeatureMap):
    """relu(q_i).relu(k_j) cos(pi/2 (i - j) / M): near tokens weigh more.

    The cosine of a difference is a sum of products, hence `[relu(x) cos a, relu(x) sin a]` with a = pi/2 i / M. The
    positions i are those of the whole sequence, on every rank; angles are float64.

    Args:
        max_positions: M; beyond M tokens apart weights would be negative, so positions have to be below it.
    """

    name = "cosformer"
    normaliser = "sum"

    def __init__(self, *, max_positions: int) -> None:
        super().__init__()
        self.max_positions = max_positions

    def features(self, head_dim: int) -> int:
        """Return twice the head dim."""
        return 2 * head_dim

    def forward(self, x: Tensor, *, positions: Tensor, side: Side) -> Tensor:
        """Return the features.

        Raises:
            ValueError: a position that is not below max_positions. On a GPU it is an assertion there instead, since
                looking would wait for the device.
        """
        inside = (positions < self.max_positions).all()
        if positions.device.type != "cpu":
            torch._assert_async(inside, f"cosformer has positions below {self.max_positions} only")
        elif not inside:
            raise ValueError(
                f"cosformer has positions below max_positions = {self.max_positions} only; "
                f"given {int(positions.max())}: raise max_positions to the longest sequence"
            )
        angles = positions.to(torch.float64) * (math.pi / 2 / self.max_positions)
        turns = torch.stack([torch.cos(angles), torch.sin(angles)], dim=-1).to(accumulator_dtype(x.dtype))
        turned = F.relu(x)[..., None, :] * turns[:, None, :, None]  # [B, T, H, 2, D]
        return turned.flatten(-2).to(x.dtype)
