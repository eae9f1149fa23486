"""What a kernel of sparse attention is: one device's arithmetic on a selection and the keys at hand. No rank."""

from typing import Literal, Protocol

from torch import Tensor

from longctx.kernels.block_sparse.selection import Selection
from longctx.kernels.contract import Request, Scores
from longctx.kernels.merge import Partial

# softmax: over all selected keys. gated: over each slot's keys, slots weighted by a softmax of their gates.
# sum: q.k itself is the weight, and nothing is normalised.
Weights = Literal["softmax", "gated", "sum"]


class SparseKernel(Protocol):
    """Attention of a q shard to what it selects of a k/v shard, continuing from what earlier hops left.

    Shapes: `q, dq [B, T, H, D]`, `dout [B, T, H, Dv]`, `k, dk [B, Tk, HK, D]`, `v, dv [B, Tk, HK, Dv]`,
    `lse, delta [B, H, T]`, `gates, dgates [B, T, H, S]`. Accumulators (`partial`, dq, dk, dv, dgates) are float32
    (float64 for float64 inputs) and written in place. With gates all keys of a slot come in one call, its tile: one
    block of `selection.block_size` positions that begins at a multiple of it. A query without a visible key keeps out
    0, lse -inf and gradient 0. Weights `sum` leave lse alone and read neither lse nor delta.
    """

    name: str

    def unsupported(self, request: Request, weights: Weights) -> str | None:
        """Return why `request` cannot be served, or None when it can."""
        ...

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        selection: Selection,
        k_positions: Tensor,
        weights: Weights,
        gates: Tensor | None,
        scores: Scores,
        partial: Partial,
    ) -> None:
        """Merge the attention to the selected of the keys at `k_positions`, int64 `[Tk]`, into `partial`."""
        ...

    def backward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        selection: Selection,
        k_positions: Tensor,
        weights: Weights,
        gates: Tensor | None,
        scores: Scores,
        dout: Tensor,
        delta: Tensor,
        lse: Tensor,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
        dgates: Tensor | None,
    ) -> None:
        """Add the gradients to `dq, dk, dv, dgates`; lse and delta are those of all hops together, sinks included."""
        ...
