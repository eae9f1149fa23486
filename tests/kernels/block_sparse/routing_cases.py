"""Routed attention as the papers write it: token by token and head by head, in Python lists. Differentiable.

`start` is the first position of a query's document, `t` the query's own position. Tensors are of one row and one head:
`[T, D]`, or `[G, T, D]` for the query heads of a KV head.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def documents(*rows: Sequence[int]) -> Tensor:
    """Return `document_of [R, total]` of rows of documents of these lengths."""
    starts = []
    for row in rows:
        begin = torch.tensor((0, *row[:-1])).cumsum(0)
        starts.append(begin.repeat_interleave(torch.tensor(row)))
    return torch.stack(starts)


def draw(*shape: int, seed: int, whole: bool = False) -> Tensor:
    """Return normal numbers, float64; rounded ones make many equal scores."""
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x.round() if whole else x


def best(scores: dict[int, float], count: int) -> list[int]:
    """Return the keys of the greatest values, of equals the lowest."""
    return sorted(scores, key=lambda block: (-scores[block], block))[:count]


def tokens_of(block: int, size: int, start: int, last: int) -> list[int]:
    """Return the positions of a block that are of the document from `start` on, up to `last`."""
    return list(range(max(block * size, start), min((block + 1) * size - 1, last) + 1))


def past_of(t: int, start: int, size: int) -> list[int]:
    """Return the blocks before t's own one in which its document has tokens."""
    return list(range(start // size, t // size))


def attend(q: Tensor, k: Tensor, v: Tensor, tokens: Sequence[int]) -> Tensor:
    """Return softmax attention of one query `[D]` to these keys; 0 where there are none."""
    if not tokens:
        return torch.zeros_like(v[0])
    weights = torch.softmax(k[list(tokens)] @ q * q.shape[0] ** -0.5, dim=0)
    return weights @ v[list(tokens)]


def moba_choice(q: Tensor, k: Tensor, t: int, start: int, *, size: int, topk: int) -> list[int]:
    """Return the blocks that query `q[t]` of a query head sees (arXiv 2502.13189, eq. 4-6)."""
    scores = {}
    for block in past_of(t, start, size):
        mean = k[tokens_of(block, size, start, t)].mean(0)
        scores[block] = float((q[t] @ mean).detach())
    return [*best(scores, topk - 1), t // size]


def nsa_compressed(x: Tensor, t: int, start: int, *, size: int, stride: int) -> dict[int, Tensor]:
    """Return the means of the compressed blocks that t sees, by number (arXiv 2502.11089, eq. 7, pooled)."""
    seen = {}
    for block in range(start // stride, len(x) // stride):
        begin, end = block * stride, block * stride + size
        if end - 1 <= t:
            seen[block] = x[max(begin, start) : end].mean(0)
    return seen


def nsa_choice(
    q: Tensor, k: Tensor, t: int, start: int, *, size: int, stride: int, block_size: int, select: int, local: int
) -> list[int]:
    """Return the blocks that the group `q [G, T, D]` selects at t (eq. 8-12)."""
    keys = nsa_compressed(k, t, start, size=size, stride=stride)
    weights = dict.fromkeys(keys, 0.0)
    for head in range(len(q)):
        if keys:
            p = torch.softmax(torch.stack(list(keys.values())) @ q[head, t] * q.shape[-1] ** -0.5, dim=0)
            weights = {block: weights[block] + float(one.detach()) for block, one in zip(keys, p, strict=True)}
    scores = {}
    for block in [*past_of(t, start, block_size), t // block_size]:
        cells = [
            block_size // stride * block + m - n for m in range(block_size // stride) for n in range(size // stride)
        ]
        scores[block] = sum(weights.get(cell, 0.0) for cell in cells)
        if block == start // block_size or t // block_size - block < local:
            scores[block] = float("inf")
    return best(scores, select)


def rotated(x: Tensor, position: int, theta: float) -> Tensor:
    """Rotate one vector `[E]` by RoPE."""
    half = len(x) // 2
    turn = torch.polar(
        torch.ones(half, dtype=torch.float64),
        position * theta ** (-torch.arange(half, dtype=torch.float64) / half),
    )
    out = torch.complex(x[:half], x[half:]) * turn
    return torch.cat([out.real, out.imag])


def seer_logits(
    q: Tensor, k: Tensor, wq: Tensor, wk: Tensor, t: int, start: int, *, size: int, theta: float | None
) -> dict[int, Tensor]:
    """Return the gate's logits over past blocks of the group `q [G, T, D]` at t (arXiv 2506.08889, sec. 3).

    `wq [G D, E]` and `wk [3 D, E]`.
    """
    query = q[:, t].flatten() @ wq
    if theta is not None:
        query = rotated(query, t, theta)
    logits = {}
    for block in past_of(t, start, size):
        keys = k[tokens_of(block, size, start, t)]
        key = torch.cat([keys.max(0).values, keys.min(0).values, keys.mean(0)]) @ wk
        if theta is not None:
            key = rotated(key, block * size, theta)
        logits[block] = query @ key * len(query) ** -0.5
    return logits


def seer_choice(logits: dict[int, Tensor], t: int, *, size: int, topk: int, threshold: float | None) -> list[int]:
    """Return the blocks that the gate opens to, t's own one included."""
    chosen = best({block: float(value.detach()) for block, value in logits.items()}, topk - 1)
    if threshold is not None and logits:
        weights = torch.softmax(torch.stack(list(logits.values())), dim=0)
        chosen = [block for block in chosen if weights[list(logits).index(block)] >= threshold]
    return [*chosen, t // size]


def seer_target(
    q: Tensor, k: Tensor, t: int, start: int, *, size: int, softcap: float | None = None, sinks: Tensor | None = None
) -> Tensor:
    """Return what the gate of the group `q [G, T, D]` ought to give to past blocks: `[blocks]`."""
    weights = []
    for head in range(len(q)):
        s = k[start : t + 1] @ q[head, t] * q.shape[-1] ** -0.5
        s = s if softcap is None else softcap * torch.tanh(s / softcap)
        s = s if sinks is None else torch.cat([s, sinks[head : head + 1]])
        weights.append(torch.softmax(s, dim=0))
    most = [
        torch.stack([one[[j - start for j in tokens_of(block, size, start, t)]].max() for one in weights]).max()
        for block in past_of(t, start, size)
    ]
    return torch.stack(most) / torch.stack(most).sum()


def chosen_sets(blocks: Tensor) -> list:
    """Return `[B, T, HS, S]` as nested lists of sorted lists of the blocks that are there."""
    return [[[sorted(x for x in slots if x >= 0) for slots in heads] for heads in row] for row in blocks.tolist()]
