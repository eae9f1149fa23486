"""The grouped softmax of Landmark Attention (arXiv 2305.16300) as gates of blocks.

A query at t in block b gives weights to items: every token of its own block at or before it, and every block before,
which its landmark stands for. An item's logit is its score; a block's tokens share what their landmark got by the
softmax of their own scores:

    weight of token j in block n < b = exp(s_t,n) / Z * softmax over n's tokens (s_t)_j,   Z = sum of exp of all items
    weight of token j in block b     = exp(s_t,j) / Z

With the log-sum-exp of the own block's scores as its gate, its tokens are items by themselves: so all of it is one
gate for each block.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longctx.kernels.block_sparse.blocks import Blocks, by_block
from longctx.kernels.merge import accumulator_dtype
from longctx.kernels.precision import without_autocast

_AT_ONCE = 1 << 22  # numbers of one intermediate tensor


def last_of_blocks(x: Tensor, blocks: Blocks) -> Tensor:
    """Return the last token of each of a rank's blocks: `[B, T, ...] -> [B, n, ...]`."""
    place = torch.arange(blocks.count, device=x.device)
    return by_block(x, blocks.block_size)[:, place, blocks.end - 1 - blocks.index * blocks.block_size]


def picked_scores(q: Tensor, landmarks: Tensor, picks: Tensor, *, softcap: float | None = None) -> Tensor:
    """Return the scaled, capped scores of queries with the landmarks that they picked, differentiable in both.

    Args:
        q: `[B, T, H, D]`.
        landmarks: `[B, N, HK, D]`.
        picks: int64 `[B, T, H, S]`, each at most once in a query's; negative = none.

    Returns:
        `[B, T, H, S]`, float32 (float64 for float64); 0 where there is no pick.
    """
    scores: Tensor = _Picked.apply(q, landmarks, picks.to(torch.int32))  # kept until the backward, in half the memory
    return _capped(scores * q.shape[-1] ** -0.5, softcap)


def own_block_lse(
    q: Tensor, k: Tensor, *, positions: Tensor, first: Tensor, block_size: int, softcap: float | None = None
) -> Tensor:
    """Return the log-sum-exp of each query's scores with its own block's keys of its document, up to itself.

    Memory is T times block_size only for a few blocks at a time: masks and scores are made again in the backward.

    Args:
        q: `[B, T, H, D]`; k: `[B, T, HK, D]`: a rank's whole blocks, of which only the sequence's last may be short.
        positions: int64 `[T]`.
        first: int64 `[R, T]`, the first position of each token's document.

    Returns:
        `[B, T, H]`, float32 (float64 for float64).
    """
    lse: Tensor = _OwnLse.apply(q, k, positions, first, block_size, softcap)
    return lse


class _Picked(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(ctx: Any, q: Tensor, landmarks: Tensor, picks: Tensor) -> Tensor:
        ctx.save_for_backward(q, landmarks, picks)
        wide = accumulator_dtype(q.dtype)
        scores = torch.empty(picks.shape, dtype=wide, device=q.device)
        for rows in _rows(picks, q.shape[-1], landmarks.shape[1]):
            near = _gathered(landmarks, picks[:, rows].long()).to(wide)
            scores[:, rows] = torch.einsum("bthd,bthsd->bths", q[:, rows].to(wide), near)
        return scores.masked_fill_(picks < 0, 0.0)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        q, landmarks, picks = ctx.saved_tensors
        wide, (count, heads) = grad.dtype, landmarks.shape[1:3]
        grad = grad.masked_fill(picks < 0, 0.0)
        dq = torch.empty_like(q)
        dlandmarks = torch.zeros(landmarks.shape, dtype=wide, device=q.device)
        for rows in _rows(picks, q.shape[-1], count):
            mine, at = grad[:, rows], picks[:, rows].long()
            dq[:, rows] = torch.einsum("bths,bthsd->bthd", mine, _gathered(landmarks, at).to(wide)).to(q.dtype)
            # Spread over all blocks and multiplied, not added to where picks point: the same bits every time.
            spread = mine.new_zeros(*at.shape[:3], count + 1)
            spread.scatter_(-1, torch.where(at < 0, count, at), mine)
            spread = spread[..., :count].unflatten(2, (heads, -1))
            dlandmarks += torch.einsum("btkgn,btkgd->bnkd", spread, q[:, rows].to(wide).unflatten(2, (heads, -1)))
        return dq, dlandmarks.to(landmarks.dtype), None


class _OwnLse(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(
        ctx: Any, q: Tensor, k: Tensor, positions: Tensor, first: Tensor, block_size: int, softcap: float | None
    ) -> Tensor:
        blocked_q, blocked_k = _blocked(q, k, block_size)
        place, start = by_block(positions[None], block_size), by_block(first, block_size)  # [1, n, b], [R, n, b]
        lse = torch.empty(blocked_q.shape[:-1], dtype=accumulator_dtype(q.dtype), device=q.device)
        for part in _parts(blocked_q):
            seen = _own_seen(place[:, part], start[:, part])
            scores = _own_scores(blocked_q[:, part], blocked_k[:, part], seen, softcap)
            lse[:, part] = scores.logsumexp(-1).movedim(-1, 2)
        ctx.save_for_backward(q, k, positions, first, lse)
        ctx.options = block_size, softcap
        return lse.flatten(3, 4).flatten(1, 2)[:, : q.shape[1]]

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, positions, first, lse = ctx.saved_tensors
        block_size, softcap = ctx.options
        blocked_q, blocked_k = _blocked(q, k, block_size)
        place, start = by_block(positions[None], block_size), by_block(first, block_size)
        grads = by_block(grad, block_size).unflatten(3, blocked_q.shape[3:5])
        dq, dk = torch.empty_like(blocked_q), torch.empty_like(blocked_k)
        for part in _parts(blocked_q):
            near_q, near_k = blocked_q[:, part], blocked_k[:, part]
            seen = _own_seen(place[:, part], start[:, part])
            scores = _own_scores(near_q, near_k, seen, softcap)
            dscores = torch.exp(scores - lse[:, part].movedim(2, -1)[..., None])
            dscores *= grads[:, part].movedim(2, -1)[..., None] * q.shape[-1] ** -0.5
            if softcap is not None:
                dscores *= 1 - (scores.masked_fill(~_of_heads(seen), 0.0) / softcap) ** 2
            dq[:, part] = torch.einsum("bnkgij,bnjkd->bnikgd", dscores, near_k.to(lse.dtype)).to(q.dtype)
            dk[:, part] = torch.einsum("bnkgij,bnikgd->bnjkd", dscores, near_q.to(lse.dtype)).to(k.dtype)
        tokens = q.shape[1]
        return dq.flatten(3, 4).flatten(1, 2)[:, :tokens], dk.flatten(1, 2)[:, :tokens], *(None,) * 4


def _own_seen(place: Tensor, start: Tensor) -> Tensor:
    """Return which keys of its own block each query sees, bool `[R, n, b, b]`.

    Args:
        place: `[1, n, b]`, positions; start: `[R, n, b]`, the first ones of their documents. What is behind a short
            block is at position 0 in a document that begins there: it sees itself, and nobody sees it.
    """
    causal = torch.ones(place.shape[-1], place.shape[-1], dtype=torch.bool, device=place.device).tril()
    return causal & (place[:, :, None, :] >= start[:, :, :, None])


def _own_scores(q: Tensor, k: Tensor, seen: Tensor, softcap: float | None) -> Tensor:
    """Return scores inside of blocks, `[B, n, HK, G, b, b]`, of q `[B, n, b, HK, G, D]` and k `[B, n, b, HK, D]`."""
    wide = accumulator_dtype(q.dtype)
    scores = torch.einsum("bnikgd,bnjkd->bnkgij", q.to(wide), k.to(wide)) * q.shape[-1] ** -0.5
    return _capped(scores, softcap).masked_fill(~_of_heads(seen), float("-inf"))


def _capped(scores: Tensor, softcap: float | None) -> Tensor:
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def _of_heads(seen: Tensor) -> Tensor:
    return seen[:, :, None, None]


def _blocked(q: Tensor, k: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    return by_block(q, block_size).unflatten(3, (k.shape[2], -1)), by_block(k, block_size)


def _parts(q: Tensor) -> list[slice]:
    """Return which blocks of `q [B, n, b, HK, group, D]` are computed together."""
    batch, blocks, size, heads, group, _ = q.shape
    step = max(1, _AT_ONCE // (batch * heads * group * size * size))
    return [slice(begin, begin + step) for begin in range(0, blocks, step)]


def _rows(picks: Tensor, head_dim: int, blocks: int) -> list[slice]:
    """Return which queries are computed together."""
    batch, tokens, heads, slots = picks.shape
    step = max(1, _AT_ONCE // max(1, batch * heads * max(slots * head_dim, blocks)))
    return [slice(begin, begin + step) for begin in range(0, tokens, step)]


def _gathered(landmarks: Tensor, picks: Tensor) -> Tensor:
    """Return `[B, t, H, S, D]`: the picked ones of `landmarks [B, N, HK, D]`."""
    batch, heads = len(picks), picks.shape[2]
    row = torch.arange(batch, device=picks.device)[:, None, None, None]
    head = torch.arange(heads, device=picks.device)[None, None, :, None] // (heads // landmarks.shape[2])
    return landmarks[row, picks.clamp(min=0), head]
