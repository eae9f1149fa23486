"""Native Sparse Attention (NSA, arXiv 2502.11089)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from longctx.kernels.block_sparse.blocks import block_mean
from longctx.kernels.block_sparse.patterns.counts import last
from longctx.kernels.block_sparse.routing.nsa import compressed, compressed_seen, nsa_blocks
from longctx.kernels.block_sparse.routing.pair_counts import routed_pairs
from longctx.kernels.block_sparse.selection import selected_blocks
from longctx.kernels.merge import accumulator_dtype
from longctx.mixers.sparse.base import (
    Inputs,
    Sizes,
    Slots,
    SparseMixer,
    SparseMixerConfig,
    Summaries,
    at_least,
    refuse_sinks,
)
from longctx.mixers.sparse_place import SparsePlace


@dataclass(frozen=True, kw_only=True)
class NsaConfig(SparseMixerConfig):
    """Settings of NSA.

    Attributes:
        block_size: tokens of a block of selection.
        compress_size: tokens of a compressed block.
        compress_stride: tokens from the beginning of one compressed block to that of the next.
        select: blocks that a query sees, those that it always sees included.
        local: blocks that a query always sees: its own one and those before it; the first block of its document is
            another one.
        window: tokens of the sliding window.
    """

    block_size: int = 64
    compress_size: int = 32
    compress_stride: int = 16
    select: int = 16
    local: int = 2
    window: int = 512

    @property
    def whole(self) -> int:
        return self.block_size

    @property
    def takes_sinks(self) -> bool:
        return False  # there are three softmaxes

    @property
    def dense_beside(self) -> bool:
        return True

    @property
    def window_beside(self) -> int:
        return self.window

    def validate(self, kind: str) -> None:
        at_least(kind, 1, block_size=self.block_size, compress_stride=self.compress_stride)
        at_least(kind, 1, compress_size=self.compress_size, local=self.local, window=self.window)
        for key in ("compress_size", "block_size"):
            if getattr(self, key) % self.compress_stride:
                raise ValueError(
                    f"mixers.{kind}.{key}={getattr(self, key)} must be a multiple of "
                    f"mixers.{kind}.compress_stride={self.compress_stride}"
                )
        if self.compress_size > self.block_size:
            raise ValueError(
                f"mixers.{kind}.compress_size={self.compress_size} must be <= "
                f"mixers.{kind}.block_size={self.block_size}: compressed blocks tell which blocks matter"
            )
        if self.select < self.local + 1:
            raise ValueError(
                f"mixers.{kind}.select={self.select} must be >= {self.local + 1}: the first block of a document and "
                f"mixers.{kind}.local={self.local} others are always among them"
            )

    def summaries(self, *, tokens: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> Summaries:
        cells = tokens // self.compress_stride * 2 * kv_heads * head_dim * accumulator_dtype(dtype).itemsize
        return Summaries("means of cells' keys and values, and their gradients", cells, cells)

    def slots(self, *, total: int, heads: int, kv_heads: int) -> tuple[Slots, ...]:
        return (Slots(kv_heads, min(self.select, -(-total // self.block_size)), classes=False),)

    def make(self, sizes: Sizes) -> SparseMixer:
        return Nsa(self, sizes)

    def pairs(self, begin: int, length: int) -> int:
        stride, size = self.compress_stride, self.compress_size
        selected = routed_pairs(begin, length, block_size=self.block_size, others=self.select - 1)
        least, most = begin // stride + size // stride, (begin + length) // stride
        # A compressed block that ends with cell n is seen from that cell's last token on.
        compress = sum(begin + length - (cell * stride - 1) for cell in range(least, most + 1))
        return compress + selected + last(length, self.window)


class Nsa(SparseMixer):
    """Attention to compressed blocks, to selected ones and to a window, each times a gate, a sigmoid of x.

    All three read the same keys and values (the paper gives each branch its own). The choice of blocks has no gradient
    of its own: keys and values of compressed blocks and the gates do. Ranks exchange the means of cells of
    `compress_stride` tokens (float32), forward, and their gradients, backward. Queries that see no compressed block
    get 0 from that branch.
    """

    def __init__(self, settings: NsaConfig, sizes: Sizes) -> None:
        super().__init__()
        self.settings = settings
        self.branch_gates = nn.Linear(sizes.dim, 3 * sizes.heads, bias=False)

    def forward(self, inputs: Inputs, *, place: SparsePlace) -> Tensor:
        refuse_sinks(inputs, "NSA")
        q, k, v = inputs.q, inputs.k, inputs.v
        keys, values = self._compressed(inputs, place)
        stride, size = self.settings.compress_stride, self.settings.compress_size
        positions, first = place.positions, place.first
        seen = compressed_seen(positions=positions, first=first, stride=stride, size=size)
        blocks = place.all_blocks(self.settings.block_size)
        chosen = nsa_blocks(
            q,
            keys,
            blocks=blocks,
            positions=positions,
            first=first,
            stride=stride,
            size=size,
            select=self.settings.select,
            local=self.settings.local,
            softcap=place.softcap,
        )
        selection = selected_blocks(chosen, block_size=blocks.block_size, positions=positions, first=first)
        gates = torch.sigmoid(self.branch_gates(inputs.x).to(accumulator_dtype(q.dtype)))  # [B, T, 3 H]
        of_compressed, of_selected, of_window = gates.unflatten(-1, (3, -1, 1)).unbind(2)
        out = of_compressed * place.attend_local(q, keys, values, seen=seen)
        out = out + of_selected * place.attend(q, k, v, selection=selection)
        return (out + of_window * place.attend_window(q, k, v, window=self.settings.window)).to(q.dtype)

    def _compressed(self, inputs: Inputs, place: SparsePlace) -> tuple[Tensor, Tensor]:
        """Return all compressed keys and values, `[B, N, HK, D]` in the dtype of k and v."""
        stride, size = self.settings.compress_stride, self.settings.compress_size
        own = place.own_blocks(stride)
        widths = (inputs.k.shape[-1], inputs.v.shape[-1])
        means = torch.cat([block_mean(inputs.k, own), block_mean(inputs.v, own)], dim=-1)  # one exchange for both
        gathered = place.gather_blocks(means, block_size=stride)
        keys, values = compressed(gathered, cells=place.all_blocks(stride), size=size).split(widths, dim=-1)
        return keys.to(inputs.k.dtype), values.to(inputs.v.dtype)
