"""Feature maps by name, and attention through one.

| name      | phi                                        | features | divided by            |
|-----------|--------------------------------------------|----------|-----------------------|
| identity  | x                                          | D        |                       |
| silu      | x sigmoid(x)                               | D        |                       |
| l2        | x / norm of x                              | D        |                       |
| elu1      | elu(x) + 1                                 | D        | sum                   |
| relu      | max(x, 0)                                  | D        | sum                   |
| softmax   | softmax(q), e^k                            | D        | sum of each feature   |
| cosformer | max(x, 0), turned by the position          | 2 D      | sum                   |
| performer | e^(w.x - x.x/2), w random                  | m        | sum                   |
| hedgehog  | softmax(W x), softmax(-W x), W learned     | 2 D      | sum                   |
"""

from collections.abc import Callable

import torch
from torch import Tensor

from longctx.kernels.linear.maps.base import FeatureMap
from longctx.kernels.linear.maps.cosformer import Cosformer
from longctx.kernels.linear.maps.efficient import Softmax
from longctx.kernels.linear.maps.hedgehog import Hedgehog
from longctx.kernels.linear.maps.performer import Performer
from longctx.kernels.linear.maps.plain import L2, Elu1, Identity, Relu, Silu

FEATURE_MAPS = ("identity", "silu", "l2", "elu1", "relu", "softmax", "cosformer", "performer", "hedgehog")


def make_feature_map(
    name: str, *, head_dim: int, heads: int, max_positions: int, seed: int, features: int | None = None
) -> FeatureMap:
    """Return the feature map called `name`.

    Args:
        head_dim: D of the queries and keys.
        heads: H of them; hedgehog learns per head.
        max_positions: tokens of the longest sequence; cosformer's M.
        seed: of performer's random features; layers with different seeds draw different ones.
        features: m of performer, default 2 D; no other map has a choice.

    Raises:
        ValueError: an unknown name, or `features` for a map that has no choice.
    """
    if features is not None and (name != "performer" or features < 1):
        raise ValueError(f"features must be >= 1 for performer and null for other maps; given {features} for {name}")
    match name:
        case "identity":
            return Identity()
        case "silu":
            return Silu()
        case "l2":
            return L2()
        case "elu1":
            return Elu1()
        case "relu":
            return Relu()
        case "softmax":
            return Softmax()
        case "cosformer":
            return Cosformer(max_positions=max_positions)
        case "performer":
            return Performer(head_dim=head_dim, features=2 * head_dim if features is None else features, seed=seed)
        case "hedgehog":
            return Hedgehog(head_dim=head_dim, heads=heads)
    raise ValueError(f"feature map {name!r} is not known; known are {', '.join(FEATURE_MAPS)}")


def normalised_attention(
    feature_map: FeatureMap,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    positions: Tensor,
    attention: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """Compute attention through a feature map, divided by what its paper divides by.

    The sums are values of the same recurrence, so they see the same documents, decays and ranks as the values do: a
    column of ones beside v for the sum of the weights; or, for the sums of each feature, one more call with the
    features as values under keys of a single 1.

    Args:
        q, k: `[B, T, H, D]`.
        v: `[B, T, H, V]`.
        positions: int64 `[T]`, global positions.
        attention: `(phi_q [B, T, H, F], phi_k, v) -> out`, linear attention without a delta rule; its decays must do
            for any F, and its scale be the same for all, for instance 1: then it cancels.

    Returns:
        `[B, T, H, V]`; 0 where a token's weights are all 0.
    """
    q, k = feature_map(q, positions=positions, side="q"), feature_map(k, positions=positions, side="k")
    if feature_map.normaliser == "none":
        return attention(q, k, v)
    if feature_map.normaliser == "sum":
        out = attention(q, k, torch.cat([v, v.new_ones(*v.shape[:-1], 1)], dim=-1))
        return _ratio(out[..., :-1], out[..., -1:])
    one = k.new_ones(*k.shape[:-1], 1)
    return attention(_ratio(q, attention(one, one, k)), k, v)


def _ratio(x: Tensor, total: Tensor) -> Tensor:
    """Return x / total, 0 where the total of non-negative terms is 0."""
    empty = total == 0
    return torch.where(empty, 0.0, x / torch.where(empty, 1.0, total))
