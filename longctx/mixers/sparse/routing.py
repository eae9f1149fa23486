"""Routing Transformer: queries see the latest keys of their k-means cluster (arXiv 2003.05997)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from longctx.kernels.block_sparse.routing.clusters import (
    cluster_selection,
    group_mean,
    kmeans_error,
    nearest,
    normalised,
)
from longctx.kernels.precision import without_autocast
from longctx.mixers.initial import normal
from longctx.mixers.sparse.base import (
    Inputs,
    Sizes,
    Slots,
    SparseMixer,
    SparseMixerConfig,
    Summaries,
    at_least,
)
from longctx.mixers.sparse_place import SparsePlace


@dataclass(frozen=True, kw_only=True)
class RoutingConfig(SparseMixerConfig):
    """Settings of routing by clusters.

    Attributes:
        clusters: centroids of each KV head.
        window: keys of its cluster that a query sees, the latest ones.
        commitment: weight of the k-means error, per token, in what is minimised: how fast centroids follow.
        block_size: tokens that kernels and ranks handle together.
    """

    clusters: int = 16
    window: int = 128
    commitment: float = 1.0
    block_size: int = 64

    def validate(self, kind: str) -> None:
        at_least(kind, 1, clusters=self.clusters, window=self.window, block_size=self.block_size)
        if not 0 < self.commitment < math.inf:
            raise ValueError(
                f"mixers.{kind}.commitment must be > 0 and finite: nothing else moves the centroids; given "
                f"{self.commitment}"
            )

    def summaries(self, *, tokens: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> Summaries:
        return Summaries("the cluster of each token's keys", tokens * kv_heads * torch.int32.itemsize, 0)

    def slots(self, *, total: int, heads: int, kv_heads: int) -> tuple[Slots, ...]:
        return (Slots(kv_heads, 2, classes=True),)

    def make(self, sizes: Sizes) -> SparseMixer:
        return Routing(self, sizes)

    def pairs(self, begin: int, length: int) -> int:
        """Return the pairs of a head if all clusters get the same share of keys and queries."""
        filling = min(length, self.window * self.clusters)  # queries whose cluster has not yet a whole window
        inside = filling * (filling + 1) / (2 * self.clusters) + (length - filling) * self.window
        return round(inside + length * (1 - 1 / self.clusters))  # own keys of another cluster


class Routing(SparseMixer):
    """Centroids for each KV head; what is compared with them is without RoPE, and of query heads that share a KV head
    the mean.

    The selection has no gradient. Centroids learn from an error of their own, sum |x - c|^2 / D, of keys and queries,
    which reaches nothing else: the optimizer's step on it is online k-means, where the paper has a moving average.
    """

    def __init__(self, settings: RoutingConfig, sizes: Sizes) -> None:
        super().__init__()
        self.settings = settings
        self.centroids = nn.Parameter(normal((sizes.kv_heads, settings.clusters, sizes.head_dim)))

    def forward(self, inputs: Inputs, *, place: SparsePlace) -> Tensor:
        q_cluster, k_cluster = self._assign(inputs, place)
        chosen = cluster_selection(
            q_cluster,
            place.gather_tokens(k_cluster),
            positions=place.positions,
            first=place.first,
            window=self.settings.window,
            block_size=self.settings.block_size,
        )
        return place.attend(inputs.q, inputs.k, inputs.v, selection=chosen, sink_logits=inputs.sink_logits)

    @without_autocast
    def _assign(self, inputs: Inputs, place: SparsePlace) -> tuple[Tensor, Tensor]:
        """Return the clusters of queries and keys, int32 `[B, T, HK]`; add the error of the centroids if training."""
        heads, _, head_dim = self.centroids.shape
        q = normalised(group_mean(inputs.plain_q.detach(), heads))
        k = normalised(inputs.plain_k.detach())
        q_cluster, k_cluster = nearest(q, self.centroids), nearest(k, self.centroids)
        if self.training and place.trains:
            error = kmeans_error(q, self.centroids, q_cluster) + kmeans_error(k, self.centroids, k_cluster)
            place.add_loss(self.settings.commitment * error / (head_dim * heads))
        return q_cluster, k_cluster
