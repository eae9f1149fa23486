"""What a feature map is: phi of `o_t = sum_s phi(q_t).phi(k_s) v_s`, maybe divided by the sum of these weights."""

from typing import Literal

from torch import Tensor, nn

Side = Literal["q", "k"]
Normaliser = Literal["none", "sum", "sum of each feature"]


class FeatureMap(nn.Module):
    """A map of queries and keys, head by head and token by token.

    What it makes of a token depends on this token, its position, the seed and learned weights only: never on which
    other tokens are on the same rank.

    Attributes:
        name: what configs call it.
        normaliser: what its paper divides by: nothing; the sum of the weights; or, feature by feature, the sum of this
            feature over the keys. `normalised_attention` does it; the sums travel with the state.
    """

    name: str
    normaliser: Normaliser

    @property
    def normalised(self) -> bool:
        """Return whether anything is divided by a sum over keys."""
        return self.normaliser != "none"

    def features(self, head_dim: int) -> int:
        """Return F, what heads of `head_dim` become."""
        return head_dim

    def forward(self, x: Tensor, *, positions: Tensor, side: Side) -> Tensor:
        """Map queries or keys.

        Args:
            x: `[B, T, H, D]`.
            positions: int64 `[T]`, global positions.
            side: whether these are queries or keys.

        Returns:
            `[B, T, H, F]` in the dtype of x; exponentials are taken in float32 (float64 for float64).
        """
        raise NotImplementedError
