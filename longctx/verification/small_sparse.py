"""Settings of sparse layers at small size: blocks of a few tokens, of which so few are selected that some are not."""

import dataclasses
from dataclasses import dataclass
from math import lcm
from typing import Any

from longctx.config import Config
from longctx.mixers.config import MixersConfig
from longctx.mixers.sparse.base import SparseMixerConfig
from longctx.mixers.sparse.landmark import LandmarkConfig
from longctx.mixers.sparse.moba import MobaConfig
from longctx.mixers.sparse.mosa import MosaConfig
from longctx.mixers.sparse.nsa import NsaConfig
from longctx.mixers.sparse.routing import RoutingConfig
from longctx.mixers.sparse.seer import SeerConfig
from longctx.mixers.sparse.sla import SlaConfig
from longctx.mixers.sparse.static import (
    NeighborhoodConfig,
    S2Config,
    SparseFixedConfig,
    SparseStridedConfig,
    VerticalSlashConfig,
)

BLOCK, LEAST_BLOCK = 8, 4  # tokens of a block, and where a rank has few
FEW_TOKENS = 48
_CLUSTERS, _SPARSITY, _GATE_DIM = 4, 4, 8


@dataclass(frozen=True)
class Scale:
    """How small it gets.

    Attributes:
        block: tokens of a block at most.
        total: tokens of a sequence; seq_len: those that are configured.
    """

    block: int
    total: int
    seq_len: int

    @property
    def longest(self) -> int:
        """Return the tokens of the longest document."""
        return max(self.total // 2, 2)

    @property
    def some(self) -> int:
        """Return how many blocks leave out most of the longest document."""
        return max(self.longest // self.block // 3, 1)

    def length(self, value: int) -> int:
        """Return a length that cuts inside the longest document: as given, or scaled as the sequence is."""
        limit = max(self.longest // 4, 1)
        return value if value <= limit else max(min(value * self.total // self.seq_len, limit), 3)


def fit_blocks(config: Config, tokens: int, *, given: bool) -> tuple[int, int]:
    """Return how many tokens a rank has, so that the layout keeps blocks whole, and how many a block has at most.

    Args:
        tokens: of a rank; as many or fewer, if that is not less than a block.
        given: on the command line: then as many.

    Raises:
        ValueError: tokens that were given cut blocks.
    """
    block = BLOCK if tokens >= FEW_TOKENS and not (given and tokens % _unit(config, BLOCK)) else LEAST_BLOCK
    unit = _unit(config, block)
    fits = max(tokens // unit, 1) * unit
    if given and tokens % unit:
        raise ValueError(
            f"--tokens (per rank) must be a multiple of {unit}, so that attention.layout={config.attention.layout} "
            f"keeps blocks of the sparse layers whole; given {tokens}: use {fits} or {fits + unit}"
        )
    return fits, block


def whole_block(config: Config, *, block: int) -> int:
    """Return what all small kinds' blocks divide that must not be cut; 1 where nothing is summarised by blocks."""
    scale = Scale(block, block, block)
    return lcm(*(_small(config.mixers.sparse_kind(kind), scale).whole for kind in config.layers.sparse_kinds))


def _unit(config: Config, block: int) -> int:
    whole = whole_block(config, block=block)
    return 2 * whole if config.attention.layout == "zigzag" and whole > 1 else whole


def small_sparse(config: Config, *, block: int, total: int) -> tuple[MixersConfig, list[str]]:
    """Return the settings of all kinds, those of sparse ones scaled, and what was scaled in words."""
    mixers, told = config.mixers, []
    scale = Scale(block, total, config.data.seq_len)
    for kind in config.layers.sparse_kinds:
        given = mixers.sparse_kind(kind)
        small = _small(given, scale)
        small.validate(kind)
        for key, value in vars(small).items():
            if (before := getattr(given, key)) != value:
                told.append(f"mixers.{kind}.{key} {_words(before)} -> {_words(value)}")
        if given.kernel == "triton":
            small = dataclasses.replace(small, kernel="auto")
            told.append(f"mixers.{kind}.kernel triton -> auto in float64")
        changed: dict[str, Any] = {kind: small}
        mixers = dataclasses.replace(mixers, **changed)
    return mixers, told


def _small(given: SparseMixerConfig, scale: Scale) -> SparseMixerConfig:
    """Return the settings of a kind, scaled and valid."""
    changes: dict[str, Any] = {}
    match given:
        case MobaConfig() | LandmarkConfig() | SlaConfig() | SeerConfig():
            changes = {"block_size": min(given.block_size, scale.block), "topk": min(given.topk, scale.some + 1)}
            if isinstance(given, SeerConfig) and given.gate_dim is not None:
                changes["gate_dim"] = min(given.gate_dim, _GATE_DIM)
        case NsaConfig():
            changes = _small_nsa(given, scale)
        case MosaConfig():
            chunk = min(given.chunk, 2 * scale.block)
            most = min(given.sparsity, _SPARSITY)
            sparsity = next(each for each in range(most, 0, -1) if given.selection == "expert" or chunk % each == 0)
            changes = {"block_size": min(given.block_size, scale.block), "sparsity": sparsity}
            if given.selection == "chunk":
                changes["chunk"] = chunk
        case RoutingConfig():
            clusters = min(given.clusters, _CLUSTERS)
            window = min(given.window, max(scale.longest // (4 * clusters), 2))
            changes = {"block_size": min(given.block_size, scale.block), "clusters": clusters, "window": window}
        case SparseStridedConfig():
            changes = {"stride": min(given.stride, scale.block)}
        case SparseFixedConfig():
            stride = min(given.stride, scale.block)
            changes = {"stride": stride, "columns": max(given.columns * stride // given.stride, 1)}
        case S2Config():
            changes = {"block_size": min(given.block_size, scale.block), "local": min(given.local, scale.some)}
            changes["stride"] = given.stride and min(given.stride, max(scale.some, 2))
        case NeighborhoodConfig():
            changes = _small_neighborhood(given, scale)
        case VerticalSlashConfig():
            window = scale.length(given.window)
            changes = {"window": window, "vertical": _small_offsets(given.vertical, scale, least=0)}
            changes["slash"] = _small_offsets(given.slash, scale, least=window)
        case _:
            raise AssertionError(given)
    return dataclasses.replace(given, **changes)


def _small_nsa(given: NsaConfig, scale: Scale) -> dict[str, int]:
    """Keep how many strides a compressed block has, and a block of selection, and how many blocks are routed to."""
    changes = {"window": scale.length(given.window)}
    stride, size, block = given.compress_stride, given.compress_size, given.block_size
    if block > scale.block:
        cells = min(block // stride, scale.block)
        stride = scale.block // cells
        block, size = cells * stride, min(size // given.compress_stride, cells) * stride
    local = min(given.local, max(scale.some // 2, 1))
    routed = min(given.select - given.local - 1, max(scale.some - local - 1, 1))
    changes |= {"block_size": block, "compress_size": size, "compress_stride": stride}
    return changes | {"local": local, "select": local + 1 + routed}


def _small_neighborhood(given: NeighborhoodConfig, scale: Scale) -> dict[str, int]:
    window = scale.length(given.window)
    dilation = min(given.dilation, max(scale.longest // (2 * window), 1))
    stride = max(given.stride * window // given.window, min(given.stride, 2, window))
    return {"window": window, "stride": stride, "dilation": dilation}


def _small_offsets(offsets: tuple[int, ...], scale: Scale, *, least: int) -> tuple[int, ...]:
    """Return offsets inside of the longest document, as many as stay different; scaled ones not below `least`."""
    far = scale.longest // 2
    small = []
    for number, each in enumerate(sorted(offsets)):
        scaled = max(each * scale.total // scale.seq_len, least + 2 * number)
        small.append(each if each <= far else min(scaled, far))
    return tuple(sorted(set(small)))


def _words(value: object) -> str:
    return f"[{', '.join(map(str, value))}]" if isinstance(value, tuple) else str(value)
