"""A sparse mixer's place with a whole sequence on one rank, everything dense: what all ranks together must equal."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from longctx.kernels.block_sparse.blocks import Blocks, blocks_of
from longctx.kernels.block_sparse.reference import selected_attention, selected_sum
from longctx.kernels.block_sparse.selection import Selection
from longctx.kernels.softmax.reference import dense_attention


@dataclass(frozen=True, kw_only=True)
class WholeSparse:
    """`mixers.sparse_place.SparsePlace` for tests and checks.

    Attributes:
        document_of: int64 `[R, total]`.
        losses: what `add_loss` was given.
    """

    document_of: Tensor
    softcap: float | None = None
    losses: list[Tensor] = field(default_factory=list)

    @property
    def total(self) -> int:
        return self.document_of.shape[1]

    @property
    def positions(self) -> Tensor:
        return torch.arange(self.total, device=self.document_of.device)

    @property
    def first(self) -> Tensor:
        return self.document_of

    def own_blocks(self, block_size: int) -> Blocks:
        return self.all_blocks(block_size)

    def all_blocks(self, block_size: int) -> Blocks:
        index = torch.arange(-(-self.total // block_size), device=self.document_of.device)
        return blocks_of(index, block_size=block_size, total=self.total, document_of=self.document_of)

    def gather_blocks(self, x: Tensor, *, block_size: int) -> Tensor:
        return x

    def gather_tokens(self, x: Tensor) -> Tensor:
        return x.detach()

    def gather_keys(self, k: Tensor) -> Tensor:
        return k.detach()

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
        return selected_attention(
            q,
            k,
            v,
            selection=selection,
            k_positions=self.positions,
            gates=gates,
            softcap=self.softcap,
            sink_logits=sink_logits,
        )[0]

    def attend_sum(self, q: Tensor, k: Tensor, v: Tensor, *, selection: Selection) -> Tensor:
        return selected_sum(q, k, v, selection=selection, k_positions=self.positions)

    def attend_window(self, q: Tensor, k: Tensor, v: Tensor, *, window: int) -> Tensor:
        return self._dense(q, k, v, torch.maximum(self.first, self.positions - window + 1), None)

    def attend_dense(self, q: Tensor, k: Tensor, v: Tensor, *, sink_logits: Tensor | None) -> Tensor:
        return self._dense(q, k, v, self.first, sink_logits)

    def attend_local(self, q: Tensor, k: Tensor, v: Tensor, *, seen: Tensor) -> Tensor:
        place = torch.arange(k.shape[1], device=k.device)
        allowed = (place >= seen[..., :1]) & (place < seen[..., 1:])  # [R, T, N]
        return self._rows(q, k, v, allowed, None)

    def recur(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        place = self.positions
        allowed = (place >= self.first[..., None]) & (place <= place[:, None])  # [R, T, T]
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * allowed[:, None]
        return torch.einsum("bhqk,bkhd->bqhd", scores, v)

    @property
    def trains(self) -> bool:
        return True

    def add_loss(self, loss: Tensor) -> None:
        self.losses.append(loss)

    def _dense(self, q: Tensor, k: Tensor, v: Tensor, begin: Tensor, sink_logits: Tensor | None) -> Tensor:
        place = self.positions
        allowed = (place >= begin[..., None]) & (place <= place[:, None])
        return self._rows(q, k, v, allowed, sink_logits)

    def _rows(self, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, sink_logits: Tensor | None) -> Tensor:
        outs = []
        for row in range(q.shape[0]):
            one = slice(row, row + 1)
            seen = allowed[row if len(allowed) > 1 else 0]
            out, _ = dense_attention(
                q[one], k[one], v[one], allowed=seen, softcap=self.softcap, sink_logits=sink_logits
            )
            outs.append(out)
        return torch.cat(outs)
