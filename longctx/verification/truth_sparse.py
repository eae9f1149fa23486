"""Who may see whom in sparse layers, written down a second time: from the words of their settings, pair by pair."""

import torch
from torch import Tensor

from longctx.mixers.sparse.base import SparseMixerConfig
from longctx.mixers.sparse.mosa import MosaConfig
from longctx.mixers.sparse.static import (
    NeighborhoodConfig,
    S2Config,
    SparseFixedConfig,
    SparseStridedConfig,
    VerticalSlashConfig,
)
from longctx.verification.truth import bounds_of


def starts_of(documents: Tensor) -> Tensor:
    """Return the first position of each token's document, int64 `[T]`, from their numbers."""
    bounds = torch.tensor(bounds_of(documents))
    return torch.repeat_interleave(bounds[:-1], bounds.diff())


def inside(documents: Tensor) -> Tensor:
    """Return which pairs are of one document, the key not behind the query: bool `[T, T]`."""
    place = torch.arange(len(documents))
    return (place[:, None] >= place[None, :]) & (documents[:, None] == documents[None, :])


def static_pairs(settings: SparseMixerConfig, documents: Tensor, *, heads: int, kv_heads: int) -> Tensor | None:
    """Return what the queries of a static pattern see, bool `[H, T, T]`; None for a kind that is routed by data.

    Args:
        documents: int64 `[T]`, a number for each document.
    """
    place = torch.arange(len(documents)) - starts_of(documents)
    i, j = place[:, None], place[None, :]
    seen = [_sees(settings, i, j, head, heads, kv_heads) for head in range(heads)]
    if any(each is None for each in seen):
        return None
    within = inside(documents)
    return torch.stack([each & within for each in seen if each is not None])


def reach(settings: SparseMixerConfig, documents: Tensor, *, heads: int, kv_heads: int) -> tuple[Tensor, Tensor]:
    """Return who at most, and who at least, is moved by whom, bool `[T, T]` (moved, by): a token moves itself."""
    itself = torch.eye(len(documents), dtype=torch.bool)
    static = static_pairs(settings, documents, heads=heads, kv_heads=kv_heads)
    if static is not None:
        return static.any(0) | itself, static.any(0) | itself
    if not causal(settings):
        return documents[:, None] == documents[None, :], torch.zeros_like(itself)
    return inside(documents), itself


def causal(settings: SparseMixerConfig) -> bool:
    """Tell whether nothing depends on later tokens: not so where a document's best tokens are chosen, by choice."""
    return not (isinstance(settings, MosaConfig) and settings.selection == "expert")


def _sees(settings: SparseMixerConfig, i: Tensor, j: Tensor, head: int, heads: int, kv_heads: int) -> Tensor | None:
    """Return whether query i of a head sees key j, both counted from where their document begins."""
    group = head * kv_heads // heads
    match settings:
        case SparseStridedConfig():
            window, column = i - j < settings.stride, (i - j) % settings.stride == 0
            return window | column if settings.heads == "merged" else (window, column)[group % 2]
        case SparseFixedConfig():
            own = i // settings.stride == j // settings.stride
            column = j % settings.stride >= settings.stride - settings.columns
            return own | column if settings.heads == "merged" else (own, column)[group % 2]
        case S2Config():
            stride = settings.stride if settings.stride is not None else max(kv_heads, min(heads, 2))
            by_head = kv_heads < stride <= heads  # more shards than KV heads: query heads have their own
            shard, count = (head, heads) if by_head else (group, kv_heads)
            block = j // settings.block_size
            own = i // settings.block_size - block < settings.local
            return own | ((block + 1 + shard * max(stride // count, 1)) % stride == 0)
        case NeighborhoodConfig():
            step, stride = settings.dilation, settings.stride
            leader = i // step // stride * stride + stride - 1
            return (i % step == j % step) & (leader - j // step < settings.window)
        case VerticalSlashConfig():
            seen = i - j < settings.window
            for place in settings.vertical:
                seen = seen | (j == place)
            for back in settings.slash:
                seen = seen | (i - j == back)
            return seen
    return None
