"""Keys of a query's own cluster (Routing Transformer, arXiv 2003.05997).

Queries and keys, normalised to one length, belong to the centroid that they point at most. The paper balances clusters:
each takes its w nearest tokens of the whole sequence, later ones included. Here each token chooses for itself, and a
query sees the last `window` keys of its cluster: nothing depends on what comes later.
"""

from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from longctx.kernels.block_sparse.routing.steady import AT_ONCE, steady_scores
from longctx.kernels.block_sparse.selection import Selection
from longctx.kernels.merge import accumulator_dtype


def normalised(x: Tensor) -> Tensor:
    """Return x with mean 0 and variance 1 over its last dim, float32 (float64 for float64), as the paper's layer norm
    without weights."""
    return F.layer_norm(x.to(accumulator_dtype(x.dtype)), x.shape[-1:])


def group_mean(q: Tensor, kv_heads: int) -> Tensor:
    """Return the mean of the query heads that share a KV head, float32 (float64): `[B, T, H, D] -> [B, T, HK, D]`.

    Added head by head, in one order whatever the shape.
    """
    heads = q.to(accumulator_dtype(q.dtype)).unflatten(2, (kv_heads, -1)).unbind(3)
    return reduce(torch.add, heads) / len(heads)


def nearest(x: Tensor, centroids: Tensor) -> Tensor:
    """Return the centroid of the greatest cosine, of equals the first: int32 `[B, T, HS]`, no gradient.

    Args:
        x: `[B, T, HS, D]`.
        centroids: `[HS, C, D]`.
    """
    unit = F.normalize(centroids.detach().to(torch.float64), dim=-1)
    runs = x.split(_tokens_at_once(x, centroids), dim=1)
    return torch.cat([steady_scores(run, unit).argmax(-1).to(torch.int32) for run in runs], dim=1)


def _tokens_at_once(x: Tensor, centroids: Tensor) -> int:
    """Return for how many tokens there is a number for every centroid at a time."""
    return max(1, AT_ONCE // (x.shape[0] * centroids.shape[0] * centroids.shape[1]))


def kmeans_error(x: Tensor, centroids: Tensor, cluster: Tensor) -> Tensor:
    """Return sum |x - centroid|^2 over all tokens and heads, differentiable in the centroids only.

    Its gradient in a centroid is 2 (count c - sum x): a step along it is MacQueen's online k-means. Computed from
    counts and sums, so that nothing is scattered: the same bits every time, at the price of cancellation where x is
    close to its centroid.

    Args:
        x: `[B, T, HS, D]`.
        centroids: `[HS, C, D]`.
        cluster: int32 `[B, T, HS]`.
    """
    x = x.detach()
    count = x.new_zeros(centroids.shape[:2])
    total = x.new_zeros(centroids.shape)
    number, size = torch.arange(centroids.shape[1], device=x.device), _tokens_at_once(x, centroids)
    for run, chosen in zip(x.split(size, dim=1), cluster.split(size, dim=1), strict=True):
        one_hot = (chosen[..., None] == number).to(x.dtype)  # [B, t, HS, C]
        count += one_hot.sum((0, 1))
        total += torch.einsum("bthc,bthd->hcd", one_hot, run)
    wide = centroids.to(x.dtype)
    return x.square().sum() - 2 * (wide * total).sum() + (count * wide.square().sum(-1)).sum()


def cluster_selection(
    q_cluster: Tensor, k_cluster: Tensor, *, positions: Tensor, first: Tensor, window: int, block_size: int
) -> Selection:
    """Let a query see the last `window` keys of its cluster, at or before itself in its document, and its own key.

    Its own key is one of the window where it is of the same cluster, else one more.

    Args:
        q_cluster: int `[B, T, HS]`, of the queries at positions, int64 `[T]`.
        k_cluster: int32 `[B, total, HS]`, of all keys.
        first: int64 `[R, T]`, the first position of each query's document.

    Returns:
        The selection, with two slots: the cluster, and the own key.
    """
    total = k_cluster.shape[1]
    place = torch.arange(total, device=k_cluster.device)
    codes = (k_cluster.long() * total + place[:, None]).transpose(1, 2).contiguous().sort(-1).values
    base = q_cluster.long().transpose(1, 2).contiguous() * total  # [B, HS, T]; codes are [B, HS, total]
    behind = torch.searchsorted(codes, base + positions, right=True)  # of the last key at or before the query
    newest = codes.gather(-1, (behind - 1).clamp(min=0)) - base
    oldest = codes.gather(-1, (behind - window).clamp(min=0)) - base
    newest = torch.where(behind > 0, newest, -1)  # negative too where it is of another cluster
    own = k_cluster[:, positions].transpose(1, 2)
    apart = own != q_cluster.transpose(1, 2)
    start, at = first[:, None, :], positions.expand_as(base)
    lo = torch.stack([torch.maximum(oldest, start), torch.where(apart, at, 1)], dim=-1)
    hi = torch.stack([newest, torch.where(apart, at, 0)], dim=-1)
    slot_class = torch.stack([q_cluster.long().transpose(1, 2), own.long()], dim=-1)
    return Selection(
        lo=lo.transpose(1, 2),
        hi=hi.transpose(1, 2),
        slot_class=slot_class.transpose(1, 2),
        key_class=k_cluster,
        block_size=block_size,
    )
