"""The settings of static sparse patterns; `kernels/block_sparse/patterns/` has what they mean."""

from dataclasses import dataclass, replace
from typing import Self

import torch

from longctx.kernels.block_sparse.patterns.fixed import Fixed
from longctx.kernels.block_sparse.patterns.heads import ALTERNATE, HEADS, MERGED
from longctx.kernels.block_sparse.patterns.neighborhood import Neighborhood
from longctx.kernels.block_sparse.patterns.pattern import Pattern
from longctx.kernels.block_sparse.patterns.s2 import S2
from longctx.kernels.block_sparse.patterns.strided import Strided
from longctx.kernels.block_sparse.patterns.vertical_slash import VerticalSlash
from longctx.mixers.sparse.base import (
    NO_SUMMARIES,
    Sizes,
    Slots,
    SparseMixer,
    SparseMixerConfig,
    Summaries,
    at_least,
)
from longctx.mixers.sparse.static_mixer import StaticMixer


@dataclass(frozen=True, kw_only=True)
class StaticConfig(SparseMixerConfig):
    """A kind of static pattern: what it says of its pattern is all that there is."""

    @property
    def pattern(self) -> Pattern:
        """Return the pattern; of settings that `validate` accepts and `of_model` returns."""
        raise NotImplementedError

    def make(self, sizes: Sizes) -> SparseMixer:
        """Return the module of a layer."""
        return StaticMixer(self.of_model(heads=sizes.heads, kv_heads=sizes.kv_heads).pattern)

    def summaries(self, *, tokens: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> Summaries:
        """Return that nothing is told: what is seen follows from positions."""
        return NO_SUMMARIES

    def slots(self, *, total: int, heads: int, kv_heads: int) -> tuple[Slots, ...]:
        """Return the sizes of the selection of one token, which are those of any."""
        nowhere = torch.zeros(1, 1, dtype=torch.int64)
        selection = self.pattern.selection(
            positions=nowhere[0], document_of=nowhere, num_heads=heads, num_kv_heads=kv_heads
        )
        return tuple(Slots(part.heads, part.slots, part.slot_class is not None) for part in selection.parts())

    def pairs(self, begin: int, length: int) -> int:
        """Return the pairs of a document, the mean over heads; see `SparseMixerConfig`."""
        return self.pattern.pairs(begin, length)


@dataclass(frozen=True, kw_only=True)
class SparseStridedConfig(StaticConfig):
    """The strided pattern of Sparse Transformers, arXiv 1904.10509.

    Attributes:
        stride: tokens of the local window, and between the keys of a column; about the root of the length.
        heads: `merged`: all heads see both in one softmax; `alternate`: KV heads in turn the one or the other.
    """

    stride: int = 128
    heads: str = MERGED

    @property
    def pattern(self) -> Strided:
        """Return the pattern."""
        return Strided(stride=self.stride, heads=self.heads)

    def validate(self, kind: str) -> None:
        """Refuse impossible settings."""
        at_least(kind, 1, stride=self.stride)
        _known_heads(kind, self.heads)

    def make(self, sizes: Sizes) -> SparseMixer:
        """Return the module of a layer."""
        _enough_heads(self.heads, sizes)
        return super().make(sizes)


@dataclass(frozen=True, kw_only=True)
class SparseFixedConfig(StaticConfig):
    """The fixed pattern of Sparse Transformers, arXiv 1904.10509.

    Attributes:
        stride: tokens of a block; a query sees its own one.
        columns: the last tokens of a block, which all later queries see.
        heads: `merged` or `alternate`, as for `SparseStridedConfig`.
    """

    stride: int = 128
    columns: int = 8
    heads: str = MERGED

    @property
    def pattern(self) -> Fixed:
        """Return the pattern."""
        return Fixed(stride=self.stride, columns=self.columns, heads=self.heads)

    def validate(self, kind: str) -> None:
        """Refuse impossible settings."""
        at_least(kind, 1, stride=self.stride, columns=self.columns)
        if self.columns > self.stride:
            raise ValueError(
                f"mixers.{kind}.columns={self.columns} are more tokens than a block has; lower it, or raise "
                f"mixers.{kind}.stride={self.stride}"
            )
        _known_heads(kind, self.heads)

    def make(self, sizes: Sizes) -> SparseMixer:
        """Return the module of a layer."""
        _enough_heads(self.heads, sizes)
        return super().make(sizes)


@dataclass(frozen=True, kw_only=True)
class NeighborhoodConfig(StaticConfig):
    """Generalized neighborhood attention in one dimension, arXiv 2504.16922.

    Attributes:
        window: keys of a window.
        stride: queries that share where their window begins; 1 = a sliding window, window = blocks.
        dilation: distance of the keys of a window.
    """

    window: int = 512
    stride: int = 1
    dilation: int = 1

    @property
    def pattern(self) -> Neighborhood:
        """Return the pattern."""
        return Neighborhood(window=self.window, stride=self.stride, dilation=self.dilation)

    def validate(self, kind: str) -> None:
        """Refuse impossible settings."""
        at_least(kind, 1, window=self.window, stride=self.stride, dilation=self.dilation)
        if self.stride > self.window:
            raise ValueError(
                f"mixers.{kind}.stride={self.stride} is more than a window: some tokens would not see themselves; "
                f"lower it, or raise mixers.{kind}.window={self.window}"
            )


@dataclass(frozen=True, kw_only=True)
class S2Config(StaticConfig):
    """S2-Attention, arXiv 2407.17678: heads share out what is before a local window.

    Attributes:
        block_size: tokens of a block.
        local: blocks of the local window.
        stride: a head sees one of so many earlier blocks; null = `model.num_kv_heads`, or 2 if there is only one of
            several query heads: as many as a layer's heads can see all of the past with between them. That is so up to
            `model.num_heads`, but above `model.num_kv_heads` query heads differ that share k and v, and kernels copy
            them for each. Above `model.num_heads` parts of the past are seen by no head.
    """

    block_size: int = 64
    local: int = 8
    stride: int | None = None

    @property
    def pattern(self) -> S2:
        """Return the pattern; of settings that `of_model` returns."""
        assert self.stride is not None, "stride depends on the model's heads"
        return S2(block_size=self.block_size, local=self.local, stride=self.stride)

    def validate(self, kind: str) -> None:
        """Refuse impossible settings."""
        at_least(kind, 1, block_size=self.block_size, local=self.local)
        if self.stride is not None:
            at_least(kind, 1, stride=self.stride)

    def note(self, *, heads: int, kv_heads: int) -> str | None:
        """Say what is seen by nobody, or costs more."""
        if self.stride is None or self.stride <= kv_heads:
            return None
        if self.stride > heads:
            return f"stride={self.stride} is more than model.num_heads={heads}: no head sees some of the past"
        return (
            f"stride={self.stride} is more than model.num_kv_heads={kv_heads}: K and V are copied for each query head"
        )

    def of_model(self, *, heads: int, kv_heads: int) -> Self:
        """Return the settings with a number for `stride`."""
        return self if self.stride is not None else replace(self, stride=max(kv_heads, min(heads, 2)))


@dataclass(frozen=True, kw_only=True)
class VerticalSlashConfig(StaticConfig):
    """Columns, diagonals and a window, arXiv 2407.02490; without diagonals it is the A-shape.

    Attributes:
        vertical: positions in a document that all later tokens see.
        slash: distances of the diagonals.
        window: last tokens that a token sees.
    """

    vertical: tuple[int, ...] = (0, 1, 2, 3)
    slash: tuple[int, ...] = ()
    window: int = 512

    def __post_init__(self) -> None:
        # OmegaConf makes lists, and configs are hashed.
        for name in ("vertical", "slash"):
            object.__setattr__(self, name, tuple(getattr(self, name)))

    @property
    def pattern(self) -> VerticalSlash:
        """Return the pattern."""
        return VerticalSlash(vertical=self.vertical, slash=self.slash, window=self.window)

    def validate(self, kind: str) -> None:
        """Refuse impossible settings."""
        at_least(kind, 1, window=self.window)
        for key in ("vertical", "slash"):
            if (least := min(getattr(self, key), default=0)) < 0:
                raise ValueError(f"mixers.{kind}.{key} must be offsets >= 0; given {least}")


def _known_heads(kind: str, heads: str) -> None:
    if heads not in HEADS:
        raise ValueError(f"mixers.{kind}.heads={heads} is not known; known are {', '.join(HEADS)}")


def _enough_heads(heads: str, sizes: Sizes) -> None:
    if heads == ALTERNATE and sizes.kv_heads < 2:
        raise ValueError(
            f"heads={ALTERNATE} gives every other KV head another pattern; given model.num_kv_heads={sizes.kv_heads}: "
            f"set heads={MERGED}, or raise model.num_kv_heads"
        )
