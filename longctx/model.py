"""A Llama-shaped decoder. It takes positions and a way to attend, and knows no rank."""

import hashlib
import math
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longctx.rope import apply_rope, rope_table

RopeTable = tuple[Tensor, Tensor]


class Attend(Protocol):
    """Somebody's attention: `q [B, T, H, D]`, `k, v [B, T, HK, D]`, `sink_logits [H]` -> out `[B, T, H, D]`."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, sink_logits: Tensor | None) -> Tensor: ...


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
    init_std: float = 0.02

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
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"model.num_heads={self.num_heads} must be a multiple of model.num_kv_heads={self.num_kv_heads}"
            )
        if self.head_dim is None and self.dim % self.num_heads:
            raise ValueError(
                f"model.dim={self.dim} is not a multiple of model.num_heads={self.num_heads}; set model.head_dim"
            )
        if self.head_size < 2 or self.head_size % 2:
            raise ValueError(f"RoPE needs an even head size; given {self.head_size} (model.head_dim)")
        if self.qk_norm not in ("none", "head"):
            raise ValueError(f"model.qk_norm={self.qk_norm} is not known; known are none, head")
        if self.softcap is not None and not 0 < self.softcap < math.inf:
            raise ValueError(f"model.softcap must be > 0 and finite, or null; given {self.softcap}")
        for name in ("rope_theta", "norm_eps", "init_std"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"model.{name} must be > 0 and finite; given {getattr(self, name)}")


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in at least float32 (Zhang and Sennrich, arXiv 1910.07467)."""

    def __init__(self, size: int, *, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x if x.dtype.itemsize >= 4 else x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight


class SelfAttention(nn.Module):
    """Projections, optional QK norm and RoPE around somebody else's attention."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_size = config.head_size
        self.q_proj = nn.Linear(config.dim, config.num_heads * self.head_size, bias=False)
        self.k_proj = nn.Linear(config.dim, config.num_kv_heads * self.head_size, bias=False)
        self.v_proj = nn.Linear(config.dim, config.num_kv_heads * self.head_size, bias=False)
        self.o_proj = nn.Linear(config.num_heads * self.head_size, config.dim, bias=False)
        normed = config.qk_norm == "head"
        self.q_norm = RMSNorm(self.head_size, eps=config.norm_eps) if normed else nn.Identity()
        self.k_norm = RMSNorm(self.head_size, eps=config.norm_eps) if normed else nn.Identity()
        self.sink_logits = nn.Parameter(torch.zeros(config.num_heads)) if config.sink_logits else None

    def forward(self, x: Tensor, *, rope: RopeTable, attend: Attend) -> Tensor:
        heads = (-1, self.head_size)
        q = self.q_norm(self.q_proj(x).unflatten(-1, heads))  # [B, T, H, D]
        k = self.k_norm(self.k_proj(x).unflatten(-1, heads))  # [B, T, HK, D]
        v = self.v_proj(x).unflatten(-1, heads)
        out = attend(apply_rope(q, rope), apply_rope(k, rope), v, sink_logits=self.sink_logits)
        return self.o_proj(out.flatten(-2))


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x) (Shazeer, arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.up_proj = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.down_proj = nn.Linear(config.hidden_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """x + attention(norm x), then x + swiglu(norm x)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.attention = SelfAttention(config)
        self.mlp_norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.mlp = SwiGLU(config)

    def forward(self, x: Tensor, *, rope: RopeTable, attend: Attend) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rope=rope, attend=attend)
        return x + self.mlp(self.mlp_norm(x))


class Decoder(nn.Module):
    """Token ids to logits. Every op but `attend` is local to a token, so any shard of tokens in any order will do."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.vocab_size is not None, "the tokenizer's size is filled in before the model is built"
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.output.weight = self.embedding.weight

    def forward(self, tokens: Tensor, *, positions: Tensor, attend: Attend) -> Tensor:
        """Return logits `[B, T, V]`.

        Args:
            tokens: int64 `[B, T]`.
            positions: int64 `[T]`, the tokens' global positions.
            attend: somebody's attention, called once per block.
        """
        x = self.embedding(tokens)
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        rope = rope_table(positions, head_dim=self.config.head_size, theta=self.config.rope_theta, dtype=wide)
        for block in self.blocks:
            x = block(x, rope=rope, attend=attend)
        return self.output(self.norm(x))


def matmul_parameters(config: ModelConfig) -> int:
    """Count the weights that every token is multiplied with: projections, SwiGLU and output, not the embedding."""
    assert config.vocab_size is not None
    attention = 2 * config.dim * config.head_size * (config.num_heads + config.num_kv_heads)
    return config.num_layers * (attention + 3 * config.dim * config.hidden_dim) + config.dim * config.vocab_size


@torch.no_grad()
def initial_weight(name: str, shape: torch.Size, *, config: ModelConfig, seed: int) -> Tensor:
    """Return the initial value of one parameter, float32 on CPU, from its name and the seed alone.

    Independent of the other parameters, of the mesh and of who owns which shard: every launch of a seed starts from the
    same model.
    """
    if len(shape) == 1:  # norms are neutral at 1, logits at 0
        return torch.zeros(shape) if name.endswith("sink_logits") else torch.ones(shape)
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    residual = name.endswith(("o_proj.weight", "down_proj.weight"))
    std = config.init_std / (2 * config.num_layers) ** 0.5 if residual else config.init_std
    return torch.empty(shape).normal_(0.0, std, generator=generator)
