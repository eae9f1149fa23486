"""What costs and kernels depend on in a linear layer."""

from dataclasses import dataclass

import torch

from longctx.kernels.linear.contract import Gate, LinearRequest
from longctx.mixers.layers import Layers
from longctx.mixers.transition import DECAYS


@dataclass(frozen=True, kw_only=True)
class LinearShape:
    """One layer of a linear kind.

    Attributes:
        recurrences: (K, V) of each: one, or two where every feature has a sum of its own.
        gate, delta: as in the kernels' contract.
        taps, channels: of the convolution; 0 and 0 without.
        kernel, chunk_size: as configured.
    """

    heads: int
    recurrences: tuple[tuple[int, int], ...]
    gate: Gate
    delta: bool
    taps: int
    channels: int
    kernel: str
    chunk_size: int | None

    @property
    def state_size(self) -> int:
        """Return the numbers of a state, of all heads and recurrences."""
        return self.heads * sum(keys * values for keys, values in self.recurrences)

    @property
    def transition_size(self) -> int:
        """Return the numbers of a transition, of all heads and recurrences."""
        if self.delta:
            return self.heads * sum(keys * keys for keys, _ in self.recurrences)
        return self.heads * sum(keys if self.gate == "diagonal" else 1 for keys, _ in self.recurrences)

    @property
    def flops_per_token(self) -> int:
        """Return the model FLOPs of the recurrence, forward and backward: 3 times the forward's.

        Forward, for each head: k v^T into the state and q out of it, 2 K V each; the delta rule reads k too.
        """
        reads = 6 if self.delta else 4
        return 3 * reads * self.state_size

    def requests(self, *, device_type: str, dtype: torch.dtype) -> list[LinearRequest]:
        """Return what the kernel is asked for."""
        return [
            LinearRequest(
                device_type=device_type,
                dtype=dtype,
                gate=self.gate,
                delta=self.delta,
                key_dim=keys,
                value_dim=values,
                chunk_size=self.chunk_size,
            )
            for keys, values in self.recurrences
        ]


def linear_shape(layers: Layers, kind: str, *, heads: int, head_dim: int) -> LinearShape:
    """Return the shape of a linear kind in a model whose heads are these."""
    settings, sizes = layers.mixers.linear_kind(kind), layers.sizes(kind, heads=heads, head_dim=head_dim)
    feature_map = sizes.feature_map(settings)
    features, values = feature_map.features(sizes.head_dim), sizes.v_head_dim
    recurrences: tuple[tuple[int, int], ...] = ((features, values + (feature_map.normaliser == "sum")),)
    if feature_map.normaliser == "sum of each feature":
        recurrences += ((1, features),)
    return LinearShape(
        heads=sizes.heads,
        recurrences=recurrences,
        gate=DECAYS[settings.decay],
        delta=settings.rule == "delta",
        taps=settings.conv,
        channels=sizes.heads * (2 * sizes.head_dim + values) if settings.conv else 0,
        kernel=settings.kernel,
        chunk_size=settings.chunk_size,
    )
