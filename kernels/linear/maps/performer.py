"""Positive orthogonal random features: FAVOR+ of Performer (arXiv 2009.14794)."""

import hashlib
from math import ceil

import torch
from torch import Tensor

from longctx.kernels.linear.maps.base import FeatureMap, Side
from longctx.kernels.linear.maps.efficient import refuse_float16
from longctx.kernels.merge import accumulator_dtype

LARGEST = 40.0  # the largest exponent of a feature of a key: e^40 a million times over stays inside of float32


class Performer(FeatureMap):
    """An unbiased estimate of softmax attention: E[phi(q).phi(k)] = e^{q.k / sqrt D}.

    With x scaled by D^-1/4 and m random directions w, phi(x)_i = e^{w_i.x - |x|^2/2} / sqrt m. Directions are
    orthogonal in groups of D, with the norms of normal vectors.

    The published code subtracts the largest exponent of all keys, which no rank knows alone. Here keys have no such
    term: w.k - |k|^2/2 is at most |w|^2/2, about D/2, whatever k is. Beyond 40 it is cut; a key comes there only where
    it nearly is one of the directions and D is above 80. Queries subtract their own largest exponent, which cancels in
    the normaliser.

    Args:
        head_dim: D.
        features: m; more of them estimate better.
        seed: of the directions, together with the epoch: all ranks have the same, on any device.
    """

    name = "performer"
    normaliser = "sum"

    def __init__(self, *, head_dim: int, features: int, seed: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.num_features = features
        self.seed = seed
        self.epoch = 0
        # Plain tensors, made when they are needed: nothing for checkpoints, nor for a build on the meta device.
        self._directions: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def features(self, head_dim: int) -> int:
        """Return the number of random features."""
        return self.num_features

    def redraw(self, epoch: int) -> None:
        """Use the directions of this epoch: the same whenever, wherever and how often it is asked for."""
        if epoch != self.epoch:
            self.epoch = epoch
            self._directions.clear()

    def directions(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return the directions `[D, m]`, already scaled by D^-1/4."""
        key = (device, dtype)
        if key not in self._directions:
            drawn = draw_directions(self.num_features, self.head_dim, seed=self.seed, epoch=self.epoch)
            self._directions[key] = (drawn.T * self.head_dim**-0.25).to(device=device, dtype=dtype).contiguous()
        return self._directions[key]

    def forward(self, x: Tensor, *, positions: Tensor, side: Side) -> Tensor:
        """Return the features, up to a factor per query.

        Raises:
            ValueError: for float16, in whose range the features do not fit.
        """
        refuse_float16(x, self.name)
        wide = x.to(accumulator_dtype(x.dtype))
        with torch.autocast(x.device.type, enabled=False):  # it would round the exponents to 16 bits
            exponents = wide @ self.directions(x.device, wide.dtype)
        if side == "q":
            exponents = exponents - exponents.detach().amax(-1, keepdim=True)
        else:
            exponents = exponents - wide.square().sum(-1, keepdim=True) * (0.5 * self.head_dim**-0.5)
            exponents = exponents.clamp(max=LARGEST)
        return (torch.exp(exponents) * self.num_features**-0.5).to(x.dtype)


def draw_directions(count: int, size: int, *, seed: int, epoch: int) -> Tensor:
    """Return `count` directions `[count, size]`, orthogonal in groups of `size`, float64 on CPU.

    Each is distributed as a normal vector. They depend on the arguments alone.
    """
    digest = hashlib.sha256(f"performer:{seed}:{epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    groups = ceil(count / size)
    with torch.device("cpu"):
        normal = torch.randn(groups, size, size, dtype=torch.float64, generator=generator)
        norms = torch.randn(groups, size, size, dtype=torch.float64, generator=generator).norm(dim=-1, keepdim=True)
        q, r = torch.linalg.qr(normal)
        # With a positive diagonal of R the decomposition is unique, and Q uniform over all rotations.
        q = q * torch.diagonal(r, dim1=-2, dim2=-1).sign()[:, None, :]
    return (q.mT * norms).flatten(0, 1)[:count]
