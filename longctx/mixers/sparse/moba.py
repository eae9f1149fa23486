"""Mixture of Block Attention (MoBA, arXiv 2502.13189)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from longctx.kernels.block_sparse.blocks import block_mean
from longctx.kernels.block_sparse.routing.moba import moba_blocks, own_slots
from longctx.kernels.block_sparse.selection import selected_blocks
from longctx.kernels.merge import accumulator_dtype
from longctx.mixers.sparse.base import NO_SUMMARIES, BestBlocksConfig, Inputs, Sizes, SparseMixer, Summaries
from longctx.mixers.sparse_place import SparsePlace


@dataclass(frozen=True, kw_only=True)
class MobaConfig(BestBlocksConfig):
    """Settings of MoBA.

    Attributes:
        block_size: tokens of a block.
        topk: blocks that a query sees, its own one included: 1 = only that.
    """

    block_size: int = 512
    topk: int = 3

    def summaries(self, *, tokens: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> Summaries:
        numbers = tokens // self.block_size * kv_heads * head_dim
        return means_of_blocks(numbers, topk=self.topk, dtype=dtype)

    def make(self, sizes: Sizes) -> SparseMixer:
        return Moba(self)


class Moba(SparseMixer):
    """One softmax over a query's own block and the best blocks before it, for every query head by itself.

    Nothing is learnt, and the choice has no gradient: keys are trained by what they are attended for. Ranks exchange
    the means of their blocks' keys (float32), where there is something to choose.
    """

    def __init__(self, settings: MobaConfig) -> None:
        super().__init__()
        self.settings = settings

    def forward(self, inputs: Inputs, *, place: SparsePlace) -> Tensor:
        block_size = self.settings.block_size
        chosen = best_blocks(inputs, place, block_size=block_size, topk=self.settings.topk)
        selection = selected_blocks(chosen, block_size=block_size, positions=place.positions, first=place.first)
        return place.attend(inputs.q, inputs.k, inputs.v, selection=selection, sink_logits=inputs.sink_logits)


def means_of_blocks(numbers: int, *, topk: int, dtype: torch.dtype) -> Summaries:
    """Return what `best_blocks` exchanges where the means of a rank's blocks have so many `numbers`."""
    if topk == 1:
        return NO_SUMMARIES
    return Summaries("means of blocks' keys", numbers * accumulator_dtype(dtype).itemsize, 0)


@torch.no_grad()
def best_blocks(inputs: Inputs, place: SparsePlace, *, block_size: int, topk: int) -> Tensor:
    """Return the own block and those before it of the best mean keys: int64 `[B, T, H, topk]`, -1 where fewer."""
    if topk == 1:
        return own_slots(place.positions, block_size=block_size, like=inputs.q)
    means = place.gather_blocks(block_mean(inputs.k, place.own_blocks(block_size)), block_size=block_size)
    return moba_blocks(
        inputs.q,
        means,
        blocks=place.all_blocks(block_size),
        positions=place.positions,
        first=place.first,
        topk=topk,
    )
