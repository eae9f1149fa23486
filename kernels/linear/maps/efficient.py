"""The softmax feature map of Efficient Attention (arXiv 1812.01243), causal."""

import torch
from torch import Tensor

from longctx.kernels.linear.maps.base import FeatureMap, Side
from longctx.kernels.merge import accumulator_dtype

KEY_BOUND = 30.0  # e^30 a million times over stays far inside of float32, and so does e^-30


class Softmax(FeatureMap):
    """Softmax of q over its features, softmax of k over the tokens seen so far.

    The paper's softmax of k over all tokens is not causal. Over the tokens seen so far it is

        o_t = sum_c softmax(q_t)_c (sum_{s<=t} e^{k_sc} v_s) / (sum_{s<=t} e^{k_sc}),

    so features are e^k and each is divided by its own sum. Any constant factor cancels, but one that is safe has to be
    known before the tokens are: keys are cut at +-30, and within that nothing overflows.
    """

    name = "softmax"
    normaliser = "sum of each feature"

    def forward(self, x: Tensor, *, positions: Tensor, side: Side) -> Tensor:
        """Return softmax(q), or e^k.

        Raises:
            ValueError: for float16, which ends at e^11.
        """
        refuse_float16(x, self.name)
        wide = x.to(accumulator_dtype(x.dtype))
        mapped = torch.softmax(wide, dim=-1) if side == "q" else torch.exp(wide.clamp(-KEY_BOUND, KEY_BOUND))
        return mapped.to(x.dtype)


def refuse_float16(x: Tensor, name: str) -> None:
    """Raise ValueError for tensors in which the map's exponentials would overflow or vanish."""
    if x.dtype == torch.float16:
        raise ValueError(f"the feature map {name} needs the range of bfloat16, float32 or float64; given float16")
