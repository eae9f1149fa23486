"""What all kinds of sparse softmax attention have in common: settings, and a module between q, k, v and out."""

from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from longctx.kernels.block_sparse.contract import Weights
from longctx.kernels.block_sparse.routing.pair_counts import routed_pairs
from longctx.kernels.contract import Request
from longctx.mixers.softmax_config import SoftmaxMixerConfig
from longctx.mixers.sparse_place import SparsePlace


class Sizes(NamedTuple):
    """The layer that a sparse mixer is for."""

    dim: int
    heads: int
    kv_heads: int
    head_dim: int


class Inputs(NamedTuple):
    """What a layer has made of its tokens.

    Attributes:
        x: `[B, T, dim]`, the normed residual stream.
        q, k, v: `[B, T, H, D]`, `[B, T, HK, D]`, `[B, T, HK, D]`; q and k are rotated.
        plain_q, plain_k: the same without RoPE.
        sink_logits: `[H]`, or None.
    """

    x: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    plain_q: Tensor
    plain_k: Tensor
    sink_logits: Tensor | None


class Summaries(NamedTuple):
    """What the router of a layer tells each other rank while it trains, for one sequence.

    Attributes:
        what: in words; empty where nothing is told.
        forward, backward: bytes to each peer.
    """

    what: str
    forward: int
    backward: int


NO_SUMMARIES = Summaries("", 0, 0)


class Slots(NamedTuple):
    """The size of a selection without others beside it: see `kernels.block_sparse.selection`.

    Attributes:
        heads: H or HK.
        per_query: slots of a query in each of them.
        classes: whether slots have classes.
    """

    heads: int
    per_query: int
    classes: bool


class SparseMixer(nn.Module):
    """Select and attend; parameters, if there are any, are those of the selection and of gates between branches."""

    def forward(self, inputs: Inputs, *, place: SparsePlace) -> Tensor:
        """Return out `[B, T, H, D]`."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class SparseMixerConfig(SoftmaxMixerConfig):
    """Settings of a kind of sparse attention.

    Attributes:
        kernel: who computes what is selected: `auto`, `torch`, `triton` or `reference`.
    """

    kernel: str = "auto"

    @property
    def whole(self) -> int:
        """Return of how many tokens a block must not be cut by the layout: 1 where blocks are not summarised."""
        return 1

    @property
    def takes_sinks(self) -> bool:
        """Tell whether `model.sink_logits` can be honoured: there is one softmax."""
        return True

    @property
    def selects(self) -> bool:
        """Tell whether queries attend to what is selected; false where all attention is dense (`mode=distill`)."""
        return True

    @property
    def dense_beside(self) -> bool:
        """Tell whether there is attention under a mask inside, which is the model's own: its kernel and schedule."""
        return False

    @property
    def window_beside(self) -> int | None:
        """Return the tokens of a sliding window whose K/V travel besides what is selected; None = there is none."""
        return None

    @property
    def linear_beside(self) -> bool:
        """Tell whether linear attention to all others is added: it passes states, and what is selected travels again
        in the accumulators' dtype, to be taken off it."""
        return False

    def note(self, *, heads: int, kv_heads: int) -> str | None:
        """Return what somebody who trains with these settings ought to know, if there is something."""
        return None

    def requests(self, request: Request) -> tuple[tuple[Request, Weights], ...]:
        """Return what a layer asks its kernel for, where attention to selected keys is `request`."""
        return ((request, "softmax"),)

    def summaries(self, *, tokens: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> Summaries:
        """Return what routing exchanges before anything is selected: nothing of it depends on who selects what.

        Args:
            tokens: of a rank, in whole blocks where the kind summarises them.
            dtype: of the arithmetic; summaries are float32 (float64 for float64).
        """
        raise NotImplementedError

    def slots(self, *, total: int, heads: int, kv_heads: int) -> tuple[Slots, ...]:
        """Return the sizes of what a layer attends to, part by part, as often as it attends to it.

        Args:
            total: tokens of a sequence.
            heads, kv_heads: of the model; of settings that `of_model` returns.
        """
        raise NotImplementedError

    def of_model(self, *, heads: int, kv_heads: int) -> Self:
        """Return the settings with numbers for what depends on the model's heads."""
        return self

    def validate(self, kind: str) -> None:
        """Refuse impossible settings; names keys as `mixers.<kind>.<key>`."""
        raise NotImplementedError

    def make(self, sizes: Sizes) -> SparseMixer:
        """Return the module of a layer."""
        raise NotImplementedError

    def pairs(self, begin: int, length: int) -> int:
        """Return how many (query, key) pairs a head computes in a document of `length` tokens from position `begin`.

        The mean over heads, rounded; of routed kinds with every candidate block counted as a whole one. Of settings
        that `of_model` returns.
        """
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class BestBlocksConfig(SparseMixerConfig):
    """Settings of kinds whose query heads each see their own block and the best ones before it.

    Attributes:
        block_size: tokens of a block.
        topk: blocks that a query sees, its own one included: 1 = only that.
    """

    block_size: int = 64
    topk: int = 8

    @property
    def whole(self) -> int:
        """Return the tokens of a block."""
        return self.block_size

    def validate(self, kind: str) -> None:
        """Refuse sizes below 1."""
        at_least(kind, 1, block_size=self.block_size, topk=self.topk)

    def slots(self, *, total: int, heads: int, kv_heads: int) -> tuple[Slots, ...]:
        """Return the size of the one selection."""
        return (best_slots(heads, total=total, block_size=self.block_size, topk=self.topk),)

    def pairs(self, begin: int, length: int) -> int:
        """Return those of the own block and of the other `topk - 1`."""
        return routed_pairs(begin, length, block_size=self.block_size, others=self.topk - 1)


def best_slots(heads: int, *, total: int, block_size: int, topk: int) -> Slots:
    """Return the size of a selection of the own block and the best `topk - 1` others."""
    return Slots(heads, min(topk - 1, -(-total // block_size)) + 1, classes=False)


def at_least(kind: str, least: int, **values: int) -> None:
    """Refuse settings below a bound (ValueError)."""
    for key, value in values.items():
        if value < least:
            raise ValueError(f"mixers.{kind}.{key} must be >= {least}; given {value}")


def refuse_sinks(inputs: Inputs, who: str) -> None:
    """Refuse sink logits where there is more than one softmax (ValueError)."""
    if inputs.sink_logits is not None:
        raise ValueError(f"{who} has more than one softmax, so sink_logits cannot join it; give None")
