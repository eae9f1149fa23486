"""Rotary position embedding from global positions (Su et al., arXiv 2104.09864), with angles in float64.

A float32 angle is off by up to 0.03 rad at position 1,000,000 and 0.125 rad at 4,000,000: the product position x
frequency needs more than 24 bits. The angles of one rank's tokens are computed once per forward, in float64, and only
their cosines and sines are rounded.
"""

import torch
from torch import Tensor

RopeTable = tuple[Tensor, Tensor]


def rope_table(positions: Tensor, *, head_dim: int, theta: float, dtype: torch.dtype = torch.float32) -> RopeTable:
    """Return cosines and sines for this rank's tokens.

    Args:
        positions: int64 `[T]`, global positions.
        head_dim: even size of a head.
        theta: base; frequency i is `theta ** (-2 i / head_dim)`.
        dtype: of the result.

    Returns:
        cos, sin, each `[T, head_dim / 2]`.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device) / head_dim
    angles = positions.to(torch.float64)[:, None] * torch.pow(theta, -exponents)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rope(x: Tensor, table: RopeTable) -> Tensor:
    """Rotate `x [B, T, H, D]`; dimension i pairs with i + D / 2 (the Llama convention). Returns x's dtype."""
    cos, sin = (part[None, :, None, :] for part in table)
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
