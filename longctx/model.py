"""A Llama-shaped decoder of softmax and linear layers. It is told where its layers are, and knows no rank."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longctx import liger
from longctx.mixers.initial import INIT_STD, mixer_weight, normal
from longctx.mixers.layers import Layers
from longctx.mixers.linear import LinearMixer
from longctx.mixers.pattern import LINEAR_KINDS, SPARSE_KINDS
from longctx.mixers.place import Attend, Place
from longctx.mixers.softmax_config import SoftmaxMixerConfig
from longctx.mixers.sparse.base import Inputs, Sizes, SparseMixer, SparseMixerConfig
from longctx.norms import RMSNorm
from longctx.rope import RopeTable, apply_rope, rope_table


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The decoder's shape.

    Attributes:
        vocab_size: null = the tokenizer's.
        dim: width of the residual stream.
        num_layers: number of blocks.
        num_heads: query heads; num_kv_heads divides it (grouped-query attention).
        head_dim: null = dim / num_heads.
        hidden_dim: width of the SwiGLU.
        rope_theta: base of the rotary frequencies.
        norm_eps: RMSNorm epsilon.
        qk_norm: `none` or `head`: RMSNorm of each head of q and k before RoPE (Qwen3).
        softcap: attention scores s become softcap * tanh(s / softcap) (Gemma 2); null = no cap.
        sink_logits: learn a logit per head and block that takes part in the softmax and has no value (gpt-oss).
        tie_embeddings: use the embedding as output projection.
        init_std: standard deviation of the initial weights; output projections get init_std / sqrt(2 num_layers).
        ops: `torch`, or `liger` for fused RMSNorm, SwiGLU and cross-entropy.
    """

    vocab_size: int | None = None
    dim: int = 128
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int | None = None
    hidden_dim: int = 384
    rope_theta: float = 500_000.0
    norm_eps: float = 1e-5
    qk_norm: str = "none"
    softcap: float | None = None
    sink_logits: bool = False
    tie_embeddings: bool = False
    init_std: float = INIT_STD
    ops: str = "torch"

    @property
    def head_size(self) -> int:
        """Return the size of one head."""
        return self.head_dim if self.head_dim is not None else self.dim // self.num_heads

    def validate(self) -> None:
        """Refuse shapes that cannot be built."""
        for name in ("dim", "num_layers", "num_heads", "num_kv_heads", "hidden_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} must be >= 1; given {getattr(self, name)}")
        if self.vocab_size is not None and self.vocab_size < 2:
            raise ValueError(f"model.vocab_size must be >= 2 or null; given {self.vocab_size}")
        if self.head_dim is None and self.dim % self.num_heads:
            raise ValueError(
                f"model.dim={self.dim} is not a multiple of model.num_heads={self.num_heads}; set model.head_dim"
            )
        if self.head_size < 1:
            raise ValueError(f"model.head_dim must be >= 1 or null; given {self.head_dim}")
        if self.qk_norm not in ("none", "head"):
            raise ValueError(f"model.qk_norm={self.qk_norm} is not known; known are none, head")
        if self.ops not in liger.OPS:
            raise ValueError(f"model.ops={self.ops} is not known; known are {', '.join(liger.OPS)}")
        if self.softcap is not None and not 0 < self.softcap < math.inf:
            raise ValueError(f"model.softcap must be > 0 and finite, or null; given {self.softcap}")
        for name in ("rope_theta", "norm_eps", "init_std"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"model.{name} must be > 0 and finite; given {getattr(self, name)}")

    def validate_attention(self, *, rope: bool) -> None:
        """Refuse shapes that layers of softmax attention cannot have.

        Args:
            rope: whether some rotate queries and keys.
        """
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"model.num_heads={self.num_heads} must be a multiple of model.num_kv_heads={self.num_kv_heads}"
            )
        if rope and self.head_size % 2:
            raise ValueError(f"RoPE needs an even head size; given {self.head_size} (model.head_dim)")


class SelfAttention(nn.Module):
    """Projections, optional QK norm, RoPE and output gate around somebody else's attention."""

    def __init__(self, config: ModelConfig, settings: SoftmaxMixerConfig) -> None:
        """Build it; sparse attention has a mixer that selects."""
        super().__init__()
        self.head_size = config.head_size
        self.q_proj = nn.Linear(config.dim, config.num_heads * self.head_size, bias=False)
        self.k_proj = nn.Linear(config.dim, config.num_kv_heads * self.head_size, bias=False)
        self.v_proj = nn.Linear(config.dim, config.num_kv_heads * self.head_size, bias=False)
        gated = settings.gate == "sigmoid"
        self.g_proj = nn.Linear(config.dim, config.num_heads * self.head_size, bias=False) if gated else None
        self.o_proj = nn.Linear(config.num_heads * self.head_size, config.dim, bias=False)
        normed = config.qk_norm == "head"
        self.q_norm = RMSNorm(self.head_size, eps=config.norm_eps) if normed else nn.Identity()
        self.k_norm = RMSNorm(self.head_size, eps=config.norm_eps) if normed else nn.Identity()
        self.sink_logits = nn.Parameter(torch.zeros(config.num_heads)) if config.sink_logits else None
        self.rope_dim = self.head_size if settings.rope else None
        self.sparse: SparseMixer | None = None
        if isinstance(settings, SparseMixerConfig):
            sizes = Sizes(config.dim, config.num_heads, config.num_kv_heads, self.head_size)
            self.sparse = settings.make(sizes)

    def forward(self, x: Tensor, *, rope: RopeTable | None, place: Place) -> Tensor:
        heads = (-1, self.head_size)
        q = self.q_norm(self.q_proj(x).unflatten(-1, heads))  # [B, T, H, D]
        k = self.k_norm(self.k_proj(x).unflatten(-1, heads))  # [B, T, HK, D]
        v = self.v_proj(x).unflatten(-1, heads)
        plain_q, plain_k = q, k
        if rope is not None:
            q, k = apply_rope(q, rope), apply_rope(k, rope)
        if self.sparse is None:
            out = place.attend(q, k, v, sink_logits=self.sink_logits)
        else:
            assert place.sparse is not None, "a layer of another kind is at this place"
            out = self.sparse(Inputs(x, q, k, v, plain_q, plain_k, self.sink_logits), place=place.sparse)
        out = out.flatten(-2)
        if self.g_proj is not None:
            out = out * torch.sigmoid(self.g_proj(x))
        return self.o_proj(out)


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x) (Shazeer, arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.up_proj = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.ops = config.ops
        self.down_proj = nn.Linear(config.hidden_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(liger.silu_mul(gate, up) if self.ops == "liger" else F.silu(gate) * up)


class Block(nn.Module):
    """x + mixer(norm x), then x + swiglu(norm x)."""

    def __init__(self, config: ModelConfig, layers: Layers, index: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, eps=config.norm_eps, ops=config.ops)
        self.attention = _mixer(config, layers, index)
        self.mlp_norm = RMSNorm(config.dim, eps=config.norm_eps, ops=config.ops)
        self.mlp = SwiGLU(config)

    def forward(self, x: Tensor, *, rope: RopeTable | None, place: Place) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rope=rope, place=place)
        return x + self.mlp(self.mlp_norm(x))


class Decoder(nn.Module):
    """Token ids to logits. Only mixers look at other tokens, so any shard of tokens in any order will do."""

    def __init__(self, config: ModelConfig, layers: Layers | None = None) -> None:
        """Build it; without `layers` all of them are softmax attention."""
        super().__init__()
        assert config.vocab_size is not None, "the tokenizer's size is filled in before the model is built"
        layers = layers or Layers(kinds=("full",) * config.num_layers)
        assert len(layers.kinds) == config.num_layers, (layers.kinds, config.num_layers)
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        blocks = [Block(config, layers, index) for index in range(config.num_layers)]
        self.blocks = nn.ModuleList(blocks)
        self._rope_sizes = [block.attention.rope_dim for block in blocks]
        self.norm = RMSNorm(config.dim, eps=config.norm_eps, ops=config.ops)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.output.weight = self.embedding.weight

    def forward(self, tokens: Tensor, *, places: Sequence[Place]) -> Tensor:
        """Return logits `[B, T', V]`, of the tokens that the last layer has.

        Args:
            tokens: int64 `[B, T]`, those that the first layer has.
            places: one for each layer; `everywhere` makes them where all layers are softmax attention at one place.
        """
        x = self.embedding(tokens)
        ropes: dict[tuple[int, int], RopeTable] = {}
        for block, size, place in zip(self.blocks, self._rope_sizes, places, strict=True):
            if place.enter is not None:
                x = place.enter(x)
            x = block(x, rope=self._rope(size, place, ropes, x.dtype), place=place)
        return self.output(self.norm(x))

    def _rope(
        self, size: int | None, place: Place, made: dict[tuple[int, int], RopeTable], dtype: torch.dtype
    ) -> RopeTable | None:
        """Return the angles of a layer; layers at the same positions share them."""
        if size is None:
            return None
        key = (size, id(place.positions))
        if key not in made:
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            made[key] = rope_table(place.positions, head_dim=size, theta=self.config.rope_theta, dtype=wide)
        return made[key]


def everywhere(config: ModelConfig, *, positions: Tensor, attend: Attend) -> list[Place]:
    """Return the places of a model of softmax layers, all of which have the tokens at `positions`, int64 `[T]`."""
    return [Place(positions=positions, attend=attend)] * config.num_layers


@lru_cache(maxsize=8)  # asked for in every step
def matmul_parameters(config: ModelConfig, layers: Layers | None = None) -> int:
    """Count the weights that every token is multiplied with: projections, SwiGLU and output, not the embedding."""
    with torch.device("meta"):
        model = Decoder(config, layers)
    counted = sum(weight.numel() for weight in model.parameters() if weight.dim() > 1)
    return counted if config.tie_embeddings else counted - model.embedding.weight.numel()


def _mixer(config: ModelConfig, layers: Layers, index: int) -> SelfAttention | LinearMixer:
    kind = layers.kinds[index]
    if kind not in LINEAR_KINDS:
        settings = layers.mixers.sparse_kind(kind) if kind in SPARSE_KINDS else layers.mixers.softmax(kind)
        return SelfAttention(config, settings)
    return LinearMixer(
        layers.mixers.linear_kind(kind),
        layers.sizes(kind, heads=config.num_heads, head_dim=config.head_size),
        dim=config.dim,
        layer=index,
        num_layers=config.num_layers,
        first=kind not in layers.kinds[:index],
        norm_eps=config.norm_eps,
    )


@torch.no_grad()
def initial_weight(name: str, shape: torch.Size, *, config: ModelConfig, seed: int) -> Tensor:
    """Return the initial value of one parameter, float32 on CPU, from its name and the seed alone.

    Independent of the other parameters, of the mesh and of who owns which shard: every launch of a seed starts from the
    same model.
    """
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    own = mixer_weight(name, shape, generator=generator)
    if own is not None:
        return own
    if len(shape) == 1:  # norms are neutral at 1, logits and biases at 0
        return torch.zeros(shape) if name.endswith(("sink_logits", ".bias")) else torch.ones(shape)
    residual = name.endswith(("o_proj.weight", "down_proj.weight"))
    std = config.init_std / (2 * config.num_layers) ** 0.5 if residual else config.init_std
    return normal(shape, std=std, generator=generator)
