"""Landmark Attention without tokens of its own for landmarks (arXiv 2305.16300)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from longctx.kernels.block_sparse.contract import Weights
from longctx.kernels.block_sparse.routing.landmark import last_of_blocks, own_block_lse, picked_scores
from longctx.kernels.block_sparse.routing.moba import moba_blocks
from longctx.kernels.block_sparse.selection import selected_blocks
from longctx.kernels.contract import Request
from longctx.kernels.merge import accumulator_dtype
from longctx.kernels.precision import without_autocast
from longctx.mixers.sparse.base import NO_SUMMARIES, BestBlocksConfig, Inputs, Sizes, SparseMixer, Summaries
from longctx.mixers.sparse_place import SparsePlace


@dataclass(frozen=True, kw_only=True)
class LandmarkConfig(BestBlocksConfig):
    """Settings of Landmark Attention.

    Attributes:
        block_size: tokens that a landmark stands for, itself included.
        topk: blocks that a query sees, its own one included; the paper trains with all and selects in inference.
    """

    def requests(self, request: Request) -> tuple[tuple[Request, Weights], ...]:
        return ((request, "gated"),)

    def summaries(self, *, tokens: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> Summaries:
        if self.topk == 1:
            return NO_SUMMARIES
        marks = tokens // self.block_size * kv_heads * head_dim * accumulator_dtype(dtype).itemsize
        return Summaries("landmarks' keys, and their gradients", marks, marks)

    def make(self, sizes: Sizes) -> SparseMixer:
        return Landmark(self, sizes)


class Landmark(SparseMixer):
    """A grouped softmax over the tokens of the own block and the landmarks of the best blocks before it.

    The paper inserts a landmark token behind every block of the data. Here nothing is inserted: the last token of a
    block doubles as its landmark, with a key of its own for that: `landmark_weight [HK, D, D]`, which begins as the
    identity, times its key as attention has it (rotated, where keys are). Scores of landmarks have gradients, so that
    they learn what to retrieve; ranks exchange nothing but the landmarks' keys (float32).
    """

    def __init__(self, settings: LandmarkConfig, sizes: Sizes) -> None:
        super().__init__()
        self.settings = settings
        self.landmark_weight = nn.Parameter(torch.eye(sizes.head_dim).repeat(sizes.kv_heads, 1, 1))

    def forward(self, inputs: Inputs, *, place: SparsePlace) -> Tensor:
        q, k = inputs.q, inputs.k
        block_size = self.settings.block_size
        landmarks = self._landmarks(k, place)
        picks = moba_blocks(  # by q . landmark: neither the scale nor a softcap changes the order
            q,
            landmarks.detach(),
            blocks=place.all_blocks(block_size),
            positions=place.positions,
            first=place.first,
            topk=self.settings.topk,
        )
        chosen = selected_blocks(picks, block_size=block_size, positions=place.positions, first=place.first)
        before = picked_scores(q, landmarks, picks[..., :-1], softcap=place.softcap)
        own = own_block_lse(
            q, k, positions=place.positions, first=place.first, block_size=block_size, softcap=place.softcap
        )
        gates = torch.cat([before, own[..., None]], dim=-1)
        return place.attend(q, k, inputs.v, selection=chosen, gates=gates, sink_logits=inputs.sink_logits)

    @without_autocast
    def _landmarks(self, k: Tensor, place: SparsePlace) -> Tensor:
        """Return the keys of all landmarks, `[B, N, HK, D]`; of this rank's where none is ever picked."""
        block_size = self.settings.block_size
        last = last_of_blocks(k, place.own_blocks(block_size)).to(torch.float64)
        own = torch.einsum("bnhd,hde->bnhe", last, self.landmark_weight.to(torch.float64))
        # Rounded from float64: the same bits, and so the same choice, however many blocks a rank has.
        own = own.to(accumulator_dtype(k.dtype))
        return own if self.settings.topk == 1 else place.gather_blocks(own, block_size=block_size)
