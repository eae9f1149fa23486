"""The best blocks of every query: scores against all blocks' summaries, chunk by chunk, and a stable top-k.

All ranks must select the same, bit for bit. So a chunk's shapes depend on the sequence, on the heads and on a constant
alone, never on how many tokens a rank has: a rank's last chunk is filled with zeros. Each block of queries is a matrix
product of its own, and every one is against all blocks; what a query may not choose is masked afterwards.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from longctx.kernels.block_sparse.blocks import Blocks, by_block, past
from longctx.kernels.merge import accumulator_dtype
from longctx.kernels.precision import in_full_float32, without_autocast

SCORES = 1 << 24  # of one chunk: 64 MiB in float32, and a few times that for what is made of them
_MOST_BLOCKS = 16  # of queries in a chunk; what a rank with fewer computes for nothing is bounded by it


@dataclass(frozen=True, eq=False, kw_only=True)
class Chunk:
    """Some blocks of queries of some KV heads.

    Attributes:
        q: `[B, n, h, G, block_size, D]`, float32 (float64 for float64); zeros where a rank has no token.
        positions: int64 `[n, block_size]`; 0 where there is no token.
        first: int64 `[R, n, block_size]`; 0 where there is no token.
        tokens: which of the rank's tokens, counted with those that fill the last chunk.
        heads: which KV heads.
    """

    q: Tensor
    positions: Tensor
    first: Tensor
    tokens: slice
    heads: slice

    def past(self, blocks: Blocks) -> Tensor:
        """Return `blocks.past` of these queries, bool `[R, n, block_size, N]`."""
        seen = past(blocks, positions=self.positions.flatten(), first=self.first.flatten(1))
        return seen.unflatten(1, self.positions.shape)


def chunk_shape(*, batch: int, kv_heads: int, rows: int, keys: int, scores: int = SCORES) -> tuple[int, int]:
    """Return how many blocks of queries and how many KV heads a chunk has.

    Args:
        rows: queries of a block and a KV head: block_size x group.
        keys: what each of them is scored against.
    """
    room = max(1, scores // (batch * rows * max(keys, 1)))
    heads = min(kv_heads, room)
    return (min(_MOST_BLOCKS, room // heads) if heads == kv_heads else 1), heads


def chunks(
    q: Tensor, *, kv_heads: int, block_size: int, positions: Tensor, first: Tensor, shape: tuple[int, int]
) -> Iterator[Chunk]:
    """Cut queries into chunks; there is at least one, so that a rank without tokens knows the results' shapes.

    Args:
        q: `[B, T, H, D]`, of whole blocks, of which the last one may be short.
        positions: int64 `[T]`; first: int64 `[R, T]`, the first position of each query's document.
        shape: of `chunk_shape`.
    """
    blocks, heads = shape
    size = blocks * block_size
    wide = accumulator_dtype(q.dtype)
    for begin in range(0, max(q.shape[1], 1), size):
        tokens = slice(begin, begin + size)
        here = by_block(_filled(q[:, tokens], size).to(wide), block_size).unflatten(3, (kv_heads, -1))
        of_head = here.permute(0, 1, 3, 4, 2, 5)  # [B, n, HK, G, block, D]
        place = by_block(_filled(positions[None, tokens], size), block_size)[0]
        document = by_block(_filled(first[:, tokens], size), block_size)
        for head in range(0, kv_heads, heads):
            some = slice(head, head + heads)
            yield Chunk(q=of_head[:, :, some], positions=place, first=document, tokens=tokens, heads=some)


def scored(chunk: Chunk, summaries: Tensor) -> Tensor:
    """Return `q . summary` of a chunk and all summaries `[B, N, HK, D]`: `[B, n, h, G, block_size, N]`."""
    keys = summaries[:, :, chunk.heads].permute(0, 2, 3, 1)[:, None].to(chunk.q.dtype)  # [B, 1, h, D, N]
    return torch.matmul(chunk.q.flatten(3, 4), keys).unflatten(3, chunk.q.shape[3:5])


@torch.no_grad()
@without_autocast
@in_full_float32
def route(
    q: Tensor,
    summaries: Tensor,
    *,
    block_size: int,
    positions: Tensor,
    first: Tensor,
    choose: Callable[[Tensor, Chunk], Tensor],
    scores: int = SCORES,
) -> Tensor:
    """Let `choose` make a selection of each chunk's scores; those of all tokens are never there at once.

    Args:
        q, positions, first: as in `chunks`.
        summaries: `[B, N, HK, D]`, of all blocks.
        choose: from scores `[B, n, h, G, block_size, N]` to `[B, n, block_size, h or h G, S]`.

    Returns:
        what it chose, `[B, T, HK or H, S]`.
    """
    batch, kv_heads = q.shape[0], summaries.shape[2]
    rows = block_size * (q.shape[2] // kv_heads)
    shape = chunk_shape(batch=batch, kv_heads=kv_heads, rows=rows, keys=summaries.shape[1], scores=scores)
    cut = chunks(q, kv_heads=kv_heads, block_size=block_size, positions=positions, first=first, shape=shape)
    return assembled(((chunk, choose(scored(chunk, summaries), chunk)) for chunk in cut), kv_heads=kv_heads)[
        :, : q.shape[1]
    ]


def assembled(parts: Iterable[tuple[Chunk, Tensor]], *, kv_heads: int) -> Tensor:
    """Put together what was made of chunks, `[B, n, block_size, a chunk's heads, ...]` each: `[B, T, heads, ...]`."""
    pieces: list[Tensor] = []
    of_heads: list[Tensor] = []
    for chunk, made in parts:
        of_heads.append(made.flatten(1, 2))
        if chunk.heads.stop >= kv_heads:
            pieces.append(torch.cat(of_heads, dim=2))
            of_heads = []
    return torch.cat(pieces, dim=1)


def top_blocks(scores: Tensor, count: int) -> Tensor:
    """Return the `count` best blocks of each query, of equals the lowest numbers; a score of -inf is never chosen.

    `torch.topk` promises nothing about ties, and a stable sort costs several times as much: the count-th score divides
    what is chosen for certain from its equals, of which the first ones fill up.

    Args:
        scores: `[..., N]`.

    Returns:
        int64 `[..., min(count, N)]`, ascending, then -1 where fewer can be chosen.
    """
    total = scores.shape[-1]
    count = min(count, total)
    if count == 0:
        return torch.empty(*scores.shape[:-1], 0, dtype=torch.int64, device=scores.device)
    least = scores.topk(count, dim=-1).values[..., -1:]
    better = scores > least
    equal = (scores == least) & ~torch.isneginf(scores)
    room = count - better.sum(-1, keepdim=True, dtype=torch.int32)
    chosen = better | (equal & (equal.cumsum(-1, dtype=torch.int32) <= room))
    order = torch.arange(total, 0, -1, dtype=torch.int32, device=scores.device)
    found = (order * chosen).topk(count, dim=-1).values.long()  # no two alike but 0
    return torch.where(found > 0, total - found, -1)


def _filled(x: Tensor, size: int) -> Tensor:
    """Return `x [B, T, ...]` with zeros behind it up to `size` tokens."""
    return F.pad(x, (*(0, 0) * (x.dim() - 2), 0, size - x.shape[1]))
