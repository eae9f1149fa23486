"""A layer of linear attention: projections, convolution, feature map and gates around somebody's recurrence."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longctx.kernels.linear.feature_maps import normalised_attention
from longctx.kernels.linear.maps.performer import Performer
from longctx.mixers.config import MixerConfig
from longctx.mixers.initial import taps
from longctx.mixers.layers import LinearSizes
from longctx.mixers.place import Place
from longctx.mixers.transition import Transition
from longctx.norms import head_norm
from longctx.rope import RopeTable, apply_rope


class LinearMixer(nn.Module):
    """Tokens `[B, T, dim]` to `[B, T, dim]`."""

    def __init__(
        self,
        settings: MixerConfig,
        sizes: LinearSizes,
        *,
        dim: int,
        layer: int,
        num_layers: int,
        first: bool,
        norm_eps: float,
    ) -> None:
        """Build layer `layer` of `num_layers`, counted from 0, the first of its kind or not, of width `dim`."""
        super().__init__()
        self.settings, self.sizes = settings, sizes
        keys, values = sizes.heads * sizes.head_dim, sizes.heads * sizes.v_head_dim
        self.q_proj = nn.Linear(dim, keys, bias=False)
        self.k_proj = nn.Linear(dim, keys, bias=False)
        self.v_proj = nn.Linear(dim, values, bias=False)
        self.g_proj = nn.Linear(dim, values, bias=False) if settings.gate != "none" else None
        self.o_proj = nn.Linear(values, dim, bias=False)
        self.conv_weight = nn.Parameter(taps((2 * keys + values, settings.conv))) if settings.conv else None
        self.feature_map = sizes.feature_map(settings, seed=(settings.feature_seed or 0) * num_layers + layer)
        self.transition = Transition(
            decay=settings.decay,
            rule=settings.rule,
            dim=dim,
            heads=sizes.heads,
            key_dim=self.feature_map.features(sizes.head_dim),
            layer=layer,
            num_layers=num_layers,
        )
        self.norm = head_norm(settings.norm, sizes.v_head_dim, eps=norm_eps)
        self.rotates = settings.rope == "all" or (settings.rope == "first" and first)

    @property
    def rope_dim(self) -> int | None:
        """Return the size of what RoPE rotates; None = nothing."""
        return self.feature_map.features(self.sizes.head_dim) if self.rotates else None

    def forward(self, x: Tensor, *, rope: RopeTable | None, place: Place) -> Tensor:
        q, k, v = self._projected(x, place)
        gates = self.transition(x)
        scale = 1.0 if self.feature_map.normalised else None
        if isinstance(self.feature_map, Performer) and self.settings.redraw_every:
            self.feature_map.redraw(place.step // self.settings.redraw_every)

        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if rope is not None:  # after the feature map, so that weights depend on distances
                q, k = apply_rope(q, rope), apply_rope(k, rope)
            return place.recur(q, k, v, g=gates.g, beta=gates.beta, scale=scale)

        out = self.norm(
            normalised_attention(self.feature_map, q, k, v, positions=place.positions, attention=attention)
        ).flatten(-2)
        if self.g_proj is not None:
            out = out * _ACTIVATIONS[self.settings.gate](self.g_proj(x))
        return self.o_proj(out)

    def _projected(self, x: Tensor, place: Place) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k `[B, T, H, K]` and v `[B, T, H, V]`, before the feature map."""
        parts = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        if self.conv_weight is not None:  # all channels at once: their halo is one exchange
            widths = [part.shape[-1] for part in parts]
            parts = place.convolve(torch.cat(parts, dim=-1), self.conv_weight).split(widths, dim=-1)
        q, k, v = (_ACTIVATIONS[self.settings.activation](part) for part in parts)
        keys = (-1, self.sizes.head_dim)
        return q.unflatten(-1, keys), k.unflatten(-1, keys), v.unflatten(-1, (-1, self.sizes.v_head_dim))


def _same(x: Tensor) -> Tensor:
    return x


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": _same,
    "linear": _same,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
}
