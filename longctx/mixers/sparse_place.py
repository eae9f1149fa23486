"""What sparse mixers are given: where their tokens lie, block summaries of all ranks, and attention to selections."""

from typing import Protocol

from torch import Tensor

from longctx.kernels.block_sparse.blocks import Blocks
from longctx.kernels.block_sparse.selection import Selection


class SparsePlace(Protocol):
    """One rank's view of a sequence; all ranks call its methods together, in the same order, forward and backward."""

    @property
    def positions(self) -> Tensor:
        """Return the global positions of this rank's tokens, int64 `[T]`, ascending in every block."""
        ...

    @property
    def total(self) -> int:
        """Return the tokens of the whole sequence."""
        ...

    @property
    def document_of(self) -> Tensor:
        """Return the first position of the document of every position, int64 `[R, total]`."""
        ...

    @property
    def first(self) -> Tensor:
        """Return the same for this rank's tokens, int64 `[R, T]`."""
        ...

    @property
    def softcap(self) -> float | None:
        """Return c of the scores' `c tanh(s / c)` (`model.softcap`); None = none."""
        ...

    def own_blocks(self, block_size: int) -> Blocks:
        """Return the blocks of this rank's tokens, in the order of its tokens."""
        ...

    def all_blocks(self, block_size: int) -> Blocks:
        """Return all blocks of the sequence."""
        ...

    def gather_blocks(self, x: Tensor, *, block_size: int) -> Tensor:
        """Return every rank's summaries `[B, N, ...]` in the order of the blocks, given this rank's `[B, n, ...]`.

        Differentiable: gradients of all ranks are added up on the rank that a block belongs to.
        """
        ...

    def gather_tokens(self, x: Tensor) -> Tensor:
        """Return every rank's numbers `[B, total, ...]` in the order of positions, given this rank's `[B, T, ...]`.

        Not differentiable, any dtype: for a class or a score per token, never for K/V.
        """
        ...

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        selection: Selection,
        gates: Tensor | None = None,
        sink_logits: Tensor | None = None,
    ) -> Tensor:
        """Return softmax attention `[B, T, H, D]` of this rank's queries to selected keys of all ranks.

        Args:
            q: `[B, T, H, D]`; k, v: `[B, T, HK, D]`.
            selection: of this rank's queries.
            gates: `[B, T, H, S]`, see `reference.selected_attention`.
        """
        ...

    def attend_sum(self, q: Tensor, k: Tensor, v: Tensor, *, selection: Selection) -> Tensor:
        """Return `reference.selected_sum` over selected keys of all ranks, `[B, T, H, Dv]`."""
        ...

    def attend_window(self, q: Tensor, k: Tensor, v: Tensor, *, window: int) -> Tensor:
        """Return softmax attention of this rank's queries to the last `window` tokens of their document."""
        ...

    def attend_dense(self, q: Tensor, k: Tensor, v: Tensor, *, sink_logits: Tensor | None) -> Tensor:
        """Return softmax attention to all before in the document."""
        ...

    def attend_local(self, q: Tensor, k: Tensor, v: Tensor, *, seen: Tensor) -> Tensor:
        """Return softmax attention to summaries that this rank has all of: no rank is asked.

        Args:
            k, v: `[B, N, HK, D]`.
            seen: int64 `[R, T, 2]`: query t sees summaries `seen[..., 0]` up to, not including, `seen[..., 1]`.
        """
        ...

    def recur(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return causal linear attention inside documents: `out_t = sum over j <= t of (q_t . k_j) v_j`.

        Neither scaled nor divided by anything.

        Args:
            q, k: `[B, T, H, K]`; v: `[B, T, H, V]`: as many heads of each.

        Returns:
            `[B, T, H, V]`.
        """
        ...

    def gather_keys(self, k: Tensor) -> Tensor:
        """Return every rank's keys `[B, total, HK, D]`, without gradient: only distillation needs them all."""
        ...

    @property
    def trains(self) -> bool:
        """Tell whether what `add_loss` is given is minimised; if not, it need not be computed."""
        ...

    def add_loss(self, loss: Tensor) -> None:
        """Add a sum over this rank's tokens to what is minimised; it is divided by the count of labels like the losses
        of tokens, and not reported among them."""
        ...
