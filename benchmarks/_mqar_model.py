"""The small model of the recall task: a gated short convolution, then the project's mixers, on one rank or on many."""

import math
from functools import partial

import torch
from _mqar_mixers import SETTINGS, layers_of
from torch import Tensor, nn

from longctx.attention import ContextParallelAttention
from longctx.kernels.mask import causal, sliding_window
from longctx.linear_attention import ContextParallelLinearAttention
from longctx.mixers.config import MixersConfig
from longctx.mixers.layers import Layers
from longctx.mixers.linear import LinearMixer
from longctx.mixers.pattern import LINEAR_KINDS, SPARSE_KINDS
from longctx.mixers.place import Place
from longctx.model import ModelConfig, SelfAttention, initial_weight
from longctx.norms import RMSNorm
from longctx.parallel.layout import Layout
from longctx.parallel.registry import resolve_schedule
from longctx.parallel.state_passing import resolve_passing
from longctx.parallel.transport import Transport
from longctx.sparse_attention import ContextParallelSparseAttention
from longctx.sparse_ranks import RankSparse

TAPS = 3
# Decays that are learned begin at this much per token: of many heads' random ones some would remember, one head must.
DECAY = 0.01
DECAY_WEIGHTS = {
    "A_log": 0.0,
    "dt_bias": math.log(math.expm1(DECAY)),  # -g = exp(A_log) softplus(dt_bias)
    "up.bias": -math.log(math.expm1(16 * DECAY)),  # -g = softplus(-bias) / 16
}


class Convolution(nn.Module):
    """Gated causal depthwise convolution: what lets a token know the ones before it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.x_proj, self.g_proj, self.o_proj = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.conv_weight = nn.Parameter(torch.empty(width, TAPS))

    def forward(self, x: Tensor, *, rope: None, place: Place) -> Tensor:
        """Return `[B, T, C]`."""
        return self.o_proj(place.convolve(self.x_proj(x), self.conv_weight) * self.g_proj(x).sigmoid())


class Model(nn.Module):
    """Embedding, convolution, mixers of one head without positions, output; each layer normed and residual."""

    def __init__(
        self, mixer: str, *, vocabulary: int, width: int, seed: int, settings: MixersConfig = SETTINGS
    ) -> None:
        super().__init__()
        layers = layers_of(mixer, settings)
        config = ModelConfig(
            dim=width, num_layers=1 + len(layers.kinds), num_heads=1, num_kv_heads=1, init_std=width**-0.5
        )
        self.embedding = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList([Convolution(width), *_mixers(layers, config)])
        self.norms = nn.ModuleList(RMSNorm(width, eps=config.norm_eps) for _ in self.layers)
        self.norm = RMSNorm(width, eps=config.norm_eps)
        self.output = nn.Linear(width, vocabulary, bias=False)
        for name, weight in self.named_parameters():
            weight.data = initial_weight(name, weight.shape, config=config, seed=seed)
            for ending, value in DECAY_WEIGHTS.items():
                if name.endswith(ending):
                    weight.data.fill_(value)

    def forward(self, sequences: Tensor, *, asked: Tensor, place: Place) -> Tensor:
        """Return logits `[N, V]` of those of this rank's tokens `[B, T]` that are `asked` for, bool `[B, T]`."""
        x = self.embedding(sequences)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(norm(x), rope=None, place=place)
        return self.output(self.norm(x[asked]))


def _mixers(layers: Layers, config: ModelConfig) -> list[nn.Module]:
    kinds, settings = layers.kinds, layers.mixers
    return [
        LinearMixer(
            settings.linear_kind(kind),
            layers.sizes(kind, heads=1, head_dim=config.dim),
            dim=config.dim,
            layer=index,
            num_layers=len(kinds),
            first=kind not in kinds[:index],
            norm_eps=config.norm_eps,
        )
        if kind in LINEAR_KINDS
        else SelfAttention(config, settings.sparse_kind(kind) if kind in SPARSE_KINDS else settings.softmax(kind))
        for index, kind in enumerate(kinds)
    ]


def window(total: int) -> int:
    """Return how many tokens the window shows, the query's own included."""
    return total // 4


def make_place(
    mixer: str, transport: Transport, *, layout: Layout, passing: str, total: int, losses: list[Tensor] | None = None
) -> Place:
    """Return where the layers are: who mixes the tokens of sequences of `total` over the ranks, all families.

    Args:
        losses: where layers put what they want minimised besides: sums over this rank's tokens.
    """
    schedule, device = resolve_schedule("ring" if layout.cp > 1 else "local"), torch.device("cpu")
    softmax = ContextParallelAttention(layout=layout, schedule=schedule, transport=transport)
    linear = ContextParallelLinearAttention(layout=layout, passing=resolve_passing(passing), transport=transport)
    sparse = ContextParallelSparseAttention(layout=layout, schedule=schedule, transport=transport)
    mask = sliding_window(window(total) - 1) if mixer == "window" else causal()
    plan = linear.plan(None, total=total, device=device)
    positions = layout.positions(transport.rank, total)
    return Place(
        positions=positions,
        attend=partial(softmax, plan=softmax.plan([mask], total=total)),
        sparse=RankSparse(
            attention=sparse,
            plan=sparse.plan(None, total=total, device=device),
            positions=positions,
            dense=softmax,
            linear=linear,
            losses=losses,
        ),
        recur=partial(linear, plan=plan),
        convolve=partial(linear.convolve, plan=plan),
    )
