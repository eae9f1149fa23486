"""Maps of states: what a stretch of a sequence does to the state that enters it.

A stretch of tokens takes a state S `[K, V]` to `M S + R`, M being its transition and R the state it makes of nothing.
Of two stretches that follow each other the maps compose:

    (M2, R2) after (M1, R1) = (M2 M1, M2 R1 + R2),   identity (1, 0)

That is associative and not commutative: the monoid of linear attention, as `merge.py` is that of softmax attention.

A transition has one of three shapes, `[..., 1, 1]` (a decay), `[..., K, 1]` (a decay per key dim) and `[..., K, K]`
(delta rules); a last dim of 1 multiplies elementwise. Decays are kept as factors in [0, 1], not as logarithms: a
stretch in which a document begins has the transition 0.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Affine:
    """Maps `S -> transition S + state`, any leading dims.

    Attributes:
        transition: `[..., 1, 1]`, `[..., K, 1]` or `[..., K, K]`.
        state: `[..., K, V]`, same dtype: float32 or float64.
    """

    transition: Tensor
    state: Tensor

    def __call__(self, state: Tensor) -> Tensor:
        """Return what becomes of a state `[..., K, V]`."""
        return apply(self.transition, state) + self.state

    def after(self, first: "Affine") -> "Affine":
        """Return the map of `first` and then this one."""
        return Affine(apply(self.transition, first.transition), self(first.state))


def apply(transition: Tensor, state: Tensor) -> Tensor:
    """Return `M S`; S may be a transition of the same shape too."""
    if transition.shape[-1] == 1:  # a decay; where K is 1 a matrix is one too
        return transition * state
    return transition @ state


def transposed(transition: Tensor) -> Tensor:
    """Return the transition of gradients, which go the other way: M^T."""
    return transition if transition.shape[-1] == 1 else transition.mT
