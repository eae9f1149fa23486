"""SeerAttention: blocks chosen by a gate that is distilled from dense attention (arXiv 2410.13276, 2506.08889)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from longctx.kernels.block_sparse.contract import Weights
from longctx.kernels.block_sparse.patterns.counts import triangle
from longctx.kernels.block_sparse.routing.distill import Teacher, gate_loss
from longctx.kernels.block_sparse.routing.moba import own_slots
from longctx.kernels.block_sparse.routing.pair_counts import routed_pairs
from longctx.kernels.block_sparse.routing.seer import gate_keys, gate_queries, pooled, seer_blocks
from longctx.kernels.block_sparse.selection import selected_blocks
from longctx.kernels.contract import Request
from longctx.kernels.merge import accumulator_dtype
from longctx.mixers.initial import normal
from longctx.mixers.sparse.base import (
    NO_SUMMARIES,
    Inputs,
    Sizes,
    Slots,
    SparseMixer,
    SparseMixerConfig,
    Summaries,
    at_least,
    best_slots,
)
from longctx.mixers.sparse_place import SparsePlace
from longctx.rope import apply_rope, rope_table

MODES = ("distill", "sparse")


@dataclass(frozen=True, kw_only=True)
class SeerConfig(SparseMixerConfig):
    """Settings of SeerAttention.

    Attributes:
        block_size: tokens of a block.
        topk: blocks that a query sees at most, its own one included.
        threshold: drop blocks to which the gate gives less of its softmax over past blocks; null = keep all topk.
        gate_dim: of the gate's queries and keys; null = the model's head_dim.
        rope_theta: base of the gate's rotary frequencies; it has them if `rope` is true.
        mode: `distill`: attention is dense, and the gate is trained to tell which blocks it looks at; `sparse`: attend
            to the blocks that the gate chooses, and leave the gate as it is.
    """

    block_size: int = 64
    topk: int = 16
    threshold: float | None = None
    gate_dim: int | None = None
    rope_theta: float = 500_000.0
    mode: str = "distill"

    @property
    def whole(self) -> int:
        return self.block_size

    @property
    def selects(self) -> bool:
        return self.mode != "distill"

    @property
    def dense_beside(self) -> bool:
        return self.mode == "distill"

    def note(self, *, heads: int, kv_heads: int) -> str | None:
        if self.mode == "distill":
            return None
        return "mode=sparse leaves the gate as it is: without a checkpoint of mode=distill, blocks are chosen at random"

    def requests(self, request: Request) -> tuple[tuple[Request, Weights], ...]:
        return super().requests(request) if self.selects else ()

    def summaries(self, *, tokens: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> Summaries:
        key = kv_heads * head_dim
        pools = tokens // self.block_size * 3 * key * accumulator_dtype(dtype).itemsize
        if not self.selects:
            return Summaries("pooled keys of blocks, and all keys to distill", pools + tokens * key * dtype.itemsize, 0)
        return Summaries("pooled keys of blocks", pools, 0) if self.topk > 1 else NO_SUMMARIES

    def slots(self, *, total: int, heads: int, kv_heads: int) -> tuple[Slots, ...]:
        best = best_slots(kv_heads, total=total, block_size=self.block_size, topk=self.topk)
        return (best,) if self.selects else ()

    def validate(self, kind: str) -> None:
        at_least(kind, 1, block_size=self.block_size, topk=self.topk)
        if self.mode not in MODES:
            raise ValueError(f"mixers.{kind}.mode={self.mode} is not known; known are {', '.join(MODES)}")
        if self.threshold is not None and not 0 < self.threshold < 1:
            raise ValueError(
                f"mixers.{kind}.threshold must be > 0 and < 1, a part of the gate's softmax, or null; given "
                f"{self.threshold}"
            )
        if not self.rope and self.rope_theta != SeerConfig.rope_theta:
            raise ValueError(
                f"mixers.{kind}.rope_theta={self.rope_theta} has no effect with mixers.{kind}.rope=false: leave it "
                f"{SeerConfig.rope_theta}"
            )
        if self.mode == "distill" and self.kernel != "auto":
            raise ValueError(
                f"mixers.{kind}.kernel={self.kernel} has no effect with mixers.{kind}.mode=distill, whose attention is "
                "dense: set attention.kernel, and leave it auto"
            )
        if not 0 < self.rope_theta < math.inf:
            raise ValueError(f"mixers.{kind}.rope_theta must be > 0 and finite; given {self.rope_theta}")
        if self.gate_dim is not None:
            at_least(kind, 1, gate_dim=self.gate_dim)
            if self.rope and self.gate_dim % 2:
                raise ValueError(
                    f"mixers.{kind}.gate_dim={self.gate_dim} must be even for RoPE; or set mixers.{kind}.rope=false"
                )

    def make(self, sizes: Sizes) -> SparseMixer:
        return Seer(self, sizes)

    def pairs(self, begin: int, length: int) -> int:
        if self.mode == "distill":
            return triangle(length)
        return routed_pairs(begin, length, block_size=self.block_size, others=self.topk - 1)


class Seer(SparseMixer):
    """A gate for each KV head, `softmax(rope(W_q [q of the group]) . rope(W_k [max, min, mean of a block's k]))`.

    q and k are those before RoPE; gate queries are rotated by their positions, the gate key of block n by
    `n block_size`. Queries are not pooled, though the first paper does it: a block's later tokens would choose for its
    earlier ones. Neither loss nor gate has a gradient in q or k, so the base model does not learn from them. Ranks
    exchange what blocks' keys are pooled to (float32); to distill, all keys.
    """

    def __init__(self, settings: SeerConfig, sizes: Sizes) -> None:
        super().__init__()
        self.settings = settings
        gate_dim = settings.gate_dim if settings.gate_dim is not None else sizes.head_dim
        group = sizes.heads // sizes.kv_heads
        self.gate_q = nn.Parameter(normal((sizes.kv_heads, group * sizes.head_dim, gate_dim)))
        self.gate_k = nn.Parameter(normal((sizes.kv_heads, 3 * sizes.head_dim, gate_dim)))
        self.requires_grad_(settings.mode == "distill")

    def forward(self, inputs: Inputs, *, place: SparsePlace) -> Tensor:
        if self.settings.mode == "distill":
            if self.training and place.trains:
                place.add_loss(self._loss(inputs, place))
            return place.attend_dense(inputs.q, inputs.k, inputs.v, sink_logits=inputs.sink_logits)
        block_size = self.settings.block_size
        chosen = self._chosen(inputs, place)
        selection = selected_blocks(chosen, block_size=block_size, positions=place.positions, first=place.first)
        return place.attend(inputs.q, inputs.k, inputs.v, selection=selection, sink_logits=inputs.sink_logits)

    @torch.no_grad()
    def _chosen(self, inputs: Inputs, place: SparsePlace) -> Tensor:
        """Return the blocks that each query sees, int64 `[B, T, HK, S]`, -1 = none."""
        block_size = self.settings.block_size
        if self.settings.topk == 1:
            return own_slots(place.positions, block_size=block_size, like=inputs.k)
        q, k = self._gate(inputs, place)
        return seer_blocks(
            q,
            k,
            blocks=place.all_blocks(block_size),
            positions=place.positions,
            first=place.first,
            topk=self.settings.topk,
            threshold=self.settings.threshold,
        )

    def _gate(self, inputs: Inputs, place: SparsePlace) -> tuple[Tensor, Tensor]:
        """Return gate queries `[B, T, HK, E]` and all blocks' gate keys `[B, N, HK, E]`, float32 (float64)."""
        block_size = self.settings.block_size
        with torch.no_grad():
            pools = pooled(inputs.plain_k, place.own_blocks(block_size))
            pools = place.gather_blocks(pools, block_size=block_size)
        q = gate_queries(inputs.plain_q.detach(), self.gate_q, block_size=block_size)
        k = gate_keys(pools, self.gate_k)
        if not self.settings.rope:
            return q, k
        begins = place.all_blocks(block_size).index * block_size
        return self._rotated(q, place.positions), self._rotated(k, begins)

    def _rotated(self, x: Tensor, positions: Tensor) -> Tensor:
        size, theta = x.shape[-1], self.settings.rope_theta
        return apply_rope(x, rope_table(positions, head_dim=size, theta=theta, dtype=x.dtype))

    def _loss(self, inputs: Inputs, place: SparsePlace) -> Tensor:
        q, k = self._gate(inputs, place)
        sinks = inputs.sink_logits
        teacher = Teacher(
            q=inputs.q.detach(),
            keys=place.gather_keys(inputs.k.detach()),
            document_of=place.document_of,
            softcap=place.softcap,
            sink_logits=None if sinks is None else sinks.detach(),
        )
        blocks = place.all_blocks(self.settings.block_size)
        return gate_loss(q, k, teacher=teacher, blocks=blocks, positions=place.positions, first=place.first)
