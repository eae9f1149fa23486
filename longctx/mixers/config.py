"""What each kind of layer is made of: the config group `mixers`, with the settings of the papers as defaults.

A linear kind is a recurrence (`kernels/linear/contract.py`) with its surroundings:

    q, k, v = projections of x, convolved, activated
    q, k    = feature map, then RoPE
    out     = norm(recurrence) * gate(x), projected back
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, fields

from longctx.kernels.block_sparse.op import KERNELS as SPARSE_KERNELS
from longctx.kernels.linear.feature_maps import FEATURE_MAPS, make_feature_map
from longctx.kernels.linear.op import KERNELS
from longctx.mixers.pattern import LINEAR_KINDS, SPARSE_KINDS
from longctx.mixers.softmax_config import SoftmaxMixerConfig
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
from longctx.mixers.transition import DECAYS
from longctx.norms import HEAD_NORMS

_KNOWN = {
    "conv": (0, 3, 4),
    "activation": ("none", "silu"),
    "feature_map": FEATURE_MAPS,
    "rope": ("none", "all", "first"),
    "decay": tuple(DECAYS),
    "rule": ("sum", "delta"),
    "norm": HEAD_NORMS,
    "gate": ("none", "linear", "sigmoid", "silu"),
    "kernel": KERNELS,
}
_PERFORMER = ("features", "feature_seed", "redraw_every")


@dataclass(frozen=True, kw_only=True)
class MixerConfig:
    """A kind of linear attention.

    Attributes:
        heads: of q, k and v alike; null = model.num_heads.
        head_dim: of q and k; null = the model's.
        v_head_dim: of v; null = the model's.
        conv: taps of a causal convolution over the tokens of q, k and v: 0 (none), 3 or 4.
        activation: of q, k and v after it: `none` or `silu`.
        feature_map: of q and k then: a name of `kernels/linear/feature_maps.py`.
        features: random features of `performer`; null = twice the head_dim.
        feature_seed: of `performer`; null = 0.
        redraw_every: optimizer steps between which `performer` keeps its features; null = for ever.
        rope: of q and k then: `none`, in `all` layers, or in the `first` one of this kind (TransNormerLLM).
        decay: a name of `mixers/transition.py`.
        rule: `sum` or `delta`.
        norm: of each head's output: `none`, `rms`, `simple_rms` (without weight) or `layer`.
        gate: what outputs are multiplied with: `none`, W x itself (`linear`), its `sigmoid` or its `silu`.
        kernel: who computes it.
        chunk_size: tokens that are computed together; null = the kernel's own choice.
    """

    heads: int | None = None
    head_dim: int | None = None
    v_head_dim: int | None = None
    conv: int = 0
    activation: str = "none"
    feature_map: str = "identity"
    features: int | None = None
    feature_seed: int | None = None
    redraw_every: int | None = None
    rope: str = "none"
    decay: str = "none"
    rule: str = "sum"
    norm: str = "none"
    gate: str = "none"
    kernel: str = "auto"
    chunk_size: int | None = None

    def validate(self, kind: str, *, head_dim: int) -> None:
        """Refuse unknown names and impossible products; `head_dim` is the model's."""
        for key, known in _KNOWN.items():
            if getattr(self, key) not in known:
                raise ValueError(
                    f"mixers.{kind}.{key}={getattr(self, key)} is not known; known are {', '.join(map(str, known))}"
                )
        for key in ("heads", "head_dim", "v_head_dim", "features", "redraw_every", "chunk_size"):
            if (value := getattr(self, key)) is not None and value < 1:
                raise ValueError(f"mixers.{kind}.{key} must be >= 1 or null; given {value}")
        if self.feature_seed is not None and self.feature_seed < 0:
            raise ValueError(f"mixers.{kind}.feature_seed must be >= 0 or null; given {self.feature_seed}")
        for key in _PERFORMER:
            if getattr(self, key) is not None and self.feature_map != "performer":
                raise ValueError(
                    f"mixers.{kind}.{key}={getattr(self, key)} is an option of feature_map=performer; given "
                    f"{self.feature_map}: leave it null"
                )
        self._validate_products(kind, head_dim=self.head_dim or head_dim)

    def _validate_products(self, kind: str, *, head_dim: int) -> None:
        feature_map = make_feature_map(self.feature_map, head_dim=1, heads=1, max_positions=1, seed=0)
        what = f"mixers.{kind}.feature_map={self.feature_map}"
        if self.rule == "delta" and self.feature_map != "l2":
            raise ValueError(f"mixers.{kind}.rule=delta is stable with keys of length 1 only: {what} must be l2")
        if self.rope != "none" and feature_map.normalised:
            raise ValueError(
                f"{what} divides by a sum of weights, which mixers.{kind}.rope={self.rope} would make negative: "
                "set rope=none, or a feature map of identity, silu, l2"
            )
        if self.rope != "none" and head_dim % 2:
            raise ValueError(f"mixers.{kind}.rope={self.rope} needs an even head_dim; given {head_dim}")
        if feature_map.normaliser == "sum of each feature" and DECAYS[self.decay] == "diagonal":
            raise ValueError(
                f"{what} divides each feature by a sum of its own, which decays of each key dim "
                f"(mixers.{kind}.decay={self.decay}) do not fit; use another feature map or decay"
            )


@dataclass(frozen=True, kw_only=True)
class MixersConfig:
    """The kinds of layers; only those that `attention.layers` names may be changed.

    Attributes:
        full, window: softmax attention.
        moba: Mixture of Block Attention, 2502.13189.
        nsa: Native Sparse Attention, 2502.11089.
        seer: SeerAttention, 2410.13276 and 2506.08889.
        landmark: Landmark Attention, 2305.16300.
        mosa: Mixture of Sparse Attention, 2505.00315.
        routing: Routing Transformer, 2003.05997.
        sla: Sparse-Linear Attention, 2509.24006.
        sparse_strided, sparse_fixed: Sparse Transformers, 1904.10509.
        s2: S2-Attention, 2407.17678.
        neighborhood: generalized neighborhood attention, 2504.16922.
        vertical_slash: MInference, 2407.02490.
        linear: Katharopoulos et al., arXiv 2006.16236.
        lightning: Lightning Attention as in MiniMax-01, 2501.08313.
        transnormer: TransNormerLLM, 2307.14995.
        retention: RetNet, 2307.08621.
        simple_gla: a decay for each token and head, as in Mamba-2, 2405.21060.
        gla: gated linear attention, 2312.06635.
        regla: GLA with a refined gate, 2502.01578.
        deltanet: 2406.06484.
        gdn: gated DeltaNet, 2412.06464.
        kda: Kimi Delta Attention, 2510.26692.
    """

    full: SoftmaxMixerConfig = field(default_factory=SoftmaxMixerConfig)
    window: SoftmaxMixerConfig = field(default_factory=SoftmaxMixerConfig)
    moba: MobaConfig = field(default_factory=MobaConfig)
    nsa: NsaConfig = field(default_factory=NsaConfig)
    seer: SeerConfig = field(default_factory=SeerConfig)
    landmark: LandmarkConfig = field(default_factory=LandmarkConfig)
    mosa: MosaConfig = field(default_factory=MosaConfig)
    routing: RoutingConfig = field(default_factory=RoutingConfig)
    sla: SlaConfig = field(default_factory=SlaConfig)
    sparse_strided: SparseStridedConfig = field(default_factory=SparseStridedConfig)
    sparse_fixed: SparseFixedConfig = field(default_factory=SparseFixedConfig)
    s2: S2Config = field(default_factory=S2Config)
    neighborhood: NeighborhoodConfig = field(default_factory=NeighborhoodConfig)
    vertical_slash: VerticalSlashConfig = field(default_factory=VerticalSlashConfig)
    linear: MixerConfig = MixerConfig(feature_map="elu1")
    lightning: MixerConfig = MixerConfig(activation="silu", decay="lightning", norm="rms", gate="sigmoid")
    transnormer: MixerConfig = MixerConfig(
        feature_map="silu", rope="first", decay="transnormer", norm="simple_rms", gate="linear"
    )
    retention: MixerConfig = MixerConfig(rope="all", decay="retention", norm="layer", gate="silu")
    simple_gla: MixerConfig = MixerConfig(conv=4, activation="silu", decay="mamba2", norm="rms", gate="silu")
    gla: MixerConfig = MixerConfig(decay="gla", norm="rms", gate="silu")
    regla: MixerConfig = MixerConfig(decay="regla", norm="rms", gate="silu")
    deltanet: MixerConfig = MixerConfig(conv=4, activation="silu", feature_map="l2", rule="delta", norm="rms")
    gdn: MixerConfig = MixerConfig(
        conv=4, activation="silu", feature_map="l2", decay="mamba2", rule="delta", norm="rms", gate="silu"
    )
    kda: MixerConfig = MixerConfig(
        conv=4, activation="silu", feature_map="l2", decay="kda", rule="delta", norm="rms", gate="sigmoid"
    )

    def softmax(self, kind: str) -> SoftmaxMixerConfig:
        """Return the settings of a kind of softmax attention."""
        found = getattr(self, kind)
        assert isinstance(found, SoftmaxMixerConfig), kind
        return found

    def sparse_kind(self, kind: str) -> SparseMixerConfig:
        """Return the settings of a kind of sparse attention."""
        found = getattr(self, kind)
        assert isinstance(found, SparseMixerConfig), kind
        return found

    def linear_kind(self, kind: str) -> MixerConfig:
        """Return the settings of a kind of linear attention."""
        found = getattr(self, kind)
        assert isinstance(found, MixerConfig), kind
        return found

    def validate(self, used: Iterable[str], *, head_dim: int) -> None:
        """Check the kinds that are used, and refuse changes of others, which would have no effect."""
        used = set(used)
        for kind in sorted(used):
            if kind in LINEAR_KINDS:
                self.linear_kind(kind).validate(kind, head_dim=head_dim)
                continue
            if kind in SPARSE_KINDS:
                self.sparse_kind(kind).validate(kind)
                if self.sparse_kind(kind).kernel not in SPARSE_KERNELS:
                    known = ", ".join(SPARSE_KERNELS)
                    raise ValueError(
                        f"mixers.{kind}.kernel={self.sparse_kind(kind).kernel} is not known; known are {known}"
                    )
            if self.softmax(kind).gate not in ("none", "sigmoid"):
                gate = self.softmax(kind).gate
                raise ValueError(f"mixers.{kind}.gate={gate} is not known; known are none, sigmoid")
        default = MixersConfig()
        for kind in (each.name for each in fields(self) if each.name not in used):
            ours, theirs = getattr(self, kind), getattr(default, kind)
            changed = [key for key, value in vars(ours).items() if value != getattr(theirs, key)]
            if changed:
                raise ValueError(
                    f"mixers.{kind}.{changed[0]}={getattr(ours, changed[0])} has no effect: attention.layers names no "
                    f"layer {kind!r}"
                )
