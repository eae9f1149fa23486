"""What a layer is given besides its input: where its tokens lie, and who mixes them. It knows no rank."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from longctx.mixers.sparse_place import SparsePlace


class Attend(Protocol):
    """Somebody's attention: `q [B, T, H, D]`, `k, v [B, T, HK, D]`, `sink_logits [H]` -> out `[B, T, H, D]`."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, sink_logits: Tensor | None) -> Tensor: ...


class Recur(Protocol):
    """Somebody's linear attention, with the arguments of the kernels' contract: -> out `[B, T, H, V]`."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, g: Tensor | None, beta: Tensor | None, scale: float | None
    ) -> Tensor: ...


Convolve = Callable[[Tensor, Tensor], Tensor]  # x [B, T, C], weight [C, k] -> [B, T, C], causal, within documents


def _nowhere(*args: object, **kwargs: object) -> Tensor:
    raise AssertionError("a layer of another kind is at this place")


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where one layer is.

    Attributes:
        positions: int64 `[T]`, global positions of the tokens that this layer has.
        enter: takes the residual stream `[B, T', dim]` from where the layer before has it to here; None = as it is.
        attend: for softmax layers.
        sparse: for sparse ones.
        recur, convolve: for linear ones.
        step: optimizer steps before this one, for what is drawn anew now and then.
    """

    positions: Tensor
    enter: Callable[[Tensor], Tensor] | None = None
    attend: Attend = _nowhere
    sparse: SparsePlace | None = None
    recur: Recur = _nowhere
    convolve: Convolve = _nowhere
    step: int = 0
