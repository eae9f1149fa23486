"""The layers of a model: which mixer each has, with its settings and sizes."""

import dataclasses
from dataclasses import dataclass, field

from longctx.kernels.linear.feature_maps import make_feature_map
from longctx.kernels.linear.maps.base import FeatureMap
from longctx.mixers.config import MixerConfig, MixersConfig
from longctx.mixers.pattern import LINEAR_KINDS, SOFTMAX_KINDS, SPARSE_KINDS, describe_layers


@dataclass(frozen=True, kw_only=True)
class LinearSizes:
    """Sizes of a linear layer.

    Attributes:
        heads, head_dim, v_head_dim: H, K before the feature map, and V.
        max_positions: tokens of the longest sequence.
    """

    heads: int
    head_dim: int
    v_head_dim: int
    max_positions: int

    def feature_map(self, settings: MixerConfig, *, seed: int = 0) -> FeatureMap:
        """Return the feature map of a layer."""
        return make_feature_map(
            settings.feature_map,
            head_dim=self.head_dim,
            heads=self.heads,
            max_positions=self.max_positions,
            seed=seed,
            features=settings.features,
        )


@dataclass(frozen=True, kw_only=True)
class Layers:
    """What mixes tokens in each layer.

    Attributes:
        kinds: names of `mixers/pattern.py`, by layer.
        max_positions: tokens of the longest sequence; only feature maps that depend on it ask.
    """

    kinds: tuple[str, ...]
    mixers: MixersConfig = field(default_factory=MixersConfig)
    max_positions: int = 1

    @property
    def used(self) -> tuple[str, ...]:
        """Return the kinds, each once, in the order of the layers."""
        return tuple(dict.fromkeys(self.kinds))

    @property
    def linear(self) -> tuple[int, ...]:
        """Return the numbers of the linear layers."""
        return tuple(index for index, kind in enumerate(self.kinds) if kind in LINEAR_KINDS)

    @property
    def softmax(self) -> tuple[int, ...]:
        """Return the numbers of the layers of softmax attention under a mask."""
        return tuple(index for index, kind in enumerate(self.kinds) if kind in SOFTMAX_KINDS)

    @property
    def sparse(self) -> tuple[int, ...]:
        """Return the numbers of the sparse layers."""
        return tuple(index for index, kind in enumerate(self.kinds) if kind in SPARSE_KINDS)

    @property
    def masked(self) -> bool:
        """Tell whether some layer has attention under a mask, maybe inside of sparse attention."""
        return bool(self.softmax) or any(self.mixers.sparse_kind(kind).dense_beside for kind in self.sparse_kinds)

    @property
    def softmax_kinds(self) -> tuple[str, ...]:
        """Return the kinds of softmax attention under a mask, each once."""
        return tuple(kind for kind in self.used if kind in SOFTMAX_KINDS)

    @property
    def sparse_kinds(self) -> tuple[str, ...]:
        """Return the kinds of sparse attention, each once."""
        return tuple(kind for kind in self.used if kind in SPARSE_KINDS)

    @property
    def linear_kinds(self) -> tuple[str, ...]:
        """Return the linear kinds, each once."""
        return tuple(kind for kind in self.used if kind in LINEAR_KINDS)

    def sizes(self, kind: str, *, heads: int, head_dim: int) -> LinearSizes:
        """Return the sizes of a linear kind in a model whose heads are these."""
        settings = self.mixers.linear_kind(kind)
        return LinearSizes(
            heads=settings.heads or heads,
            head_dim=settings.head_dim or head_dim,
            v_head_dim=settings.v_head_dim or head_dim,
            max_positions=self.max_positions,
        )

    def _feature_map(self, kind: str, heads: int, head_dim: int) -> FeatureMap:
        return self.sizes(kind, heads=heads, head_dim=head_dim).feature_map(self.mixers.linear_kind(kind))

    def arithmetic(self, heads: int, head_dim: int) -> dict[str, object]:
        """Return what decides what the layers compute, by config key; a checkpoint has the same.

        Softmax attention as it is by default says nothing, whatever its mask.
        """
        settings = {kind: dataclasses.asdict(getattr(self.mixers, kind)) for kind in self.used}
        if list(settings.values()) == [dataclasses.asdict(MixersConfig().full)]:
            return {"attention.layers": None}
        for kind in (kind for kind in settings if kind in LINEAR_KINDS):
            settings[kind] |= dataclasses.asdict(self.sizes(kind, heads=heads, head_dim=head_dim))
            if settings[kind]["feature_map"] == "performer":
                width = settings[kind]["head_dim"]
                settings[kind]["features"] = self._feature_map(kind, heads, head_dim).features(width)
                settings[kind]["feature_seed"] = settings[kind]["feature_seed"] or 0
            for key in ("kernel", "chunk_size", "max_positions"):  # the same numbers, or compared elsewhere
                del settings[kind][key]
        for kind in (kind for kind in settings if kind in SPARSE_KINDS):
            del settings[kind]["kernel"]
        found: dict[str, object] = {"attention.layers": describe_layers(self.kinds)}
        for kind, values in settings.items():
            found |= {f"mixers.{kind}.{key}": value for key, value in values.items()}
        return found
