"""Attention of a rectangle by plain matrix products, block by block: for what library kernels do not serve.

FlashAttention's loops (arXiv 2205.14135, algorithms 1 and 4) with torch operations for their bodies, so any device, any
head dims, float64 and a softcap. All arithmetic is in the accumulators' dtype. Next to inputs and results there is one
chunk of heads in that dtype and two or three blocks of scores: nothing grows with rows x columns.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from longctx.kernels.contract import Request, Scores
from longctx.kernels.merge import accumulator_dtype
from longctx.kernels.softmax.rectangles import Rectangle

# Rows x columns of a block, and the scores of all KV heads that are computed together. A row is a query and one of the
# query heads of a KV head. On a CPU a block should stay in the second cache, on a GPU it should fill the device.
BLOCKS = {"cpu": (256, 512, 2**17), "cuda": (1024, 2048, 2**25)}


@dataclass(frozen=True, slots=True)
class _Block:
    """Rows and columns of a rectangle; within it row i sees column j iff `lo <= j - i <= hi`."""

    rows: slice
    columns: slice
    lo: int
    hi: int

    @property
    def n(self) -> int:
        return self.rows.stop - self.rows.start

    @property
    def m(self) -> int:
        return self.columns.stop - self.columns.start

    @property
    def full(self) -> bool:
        return self.lo <= 1 - self.n and self.hi >= self.m - 1


class Blocked:
    """Bounded memory, everything but arbitrary predicates."""

    name = "torch:Blocked"
    square_causal = False
    high_bands = False

    def unsupported(self, request: Request) -> str | None:
        return None

    def row_term(self, dout: Tensor, delta: Tensor) -> Tensor:
        return delta.transpose(1, 2)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, shape: Rectangle, scores: Scores) -> tuple[Tensor, Tensor]:
        """Return out `[B, n, H, Dv]` and lse `[B, H, n]`, both in the accumulators' dtype."""
        (batch, n, heads, _), dtype = q.shape, accumulator_dtype(q.dtype)
        out = torch.empty(batch, n, heads, v.shape[-1], dtype=dtype, device=q.device)
        lse = torch.empty(batch, heads, n, dtype=dtype, device=q.device)
        height, width, chunks = _partition(q, k)
        for b, chunk in chunks:
            q_chunk, out_chunk = (_queries(x[b], k.shape[2], chunk) for x in (q, out))
            lse_chunk = lse[b].unflatten(0, (k.shape[2], -1))[chunk]
            k_chunk, v_chunk = (_keys(x[b], chunk, dtype) for x in (k, v))
            for row_of_blocks in _blocks(shape, height, width):
                rows = row_of_blocks[0].rows
                part = _forward_rows(q_chunk[:, :, rows], k_chunk, v_chunk, row_of_blocks, scores)
                out_chunk[:, :, rows], lse_chunk[:, :, rows] = part
        return out, lse

    def backward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        shape: Rectangle,
        scores: Scores,
        dout: Tensor,
        row_term: Tensor,
        lse: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return dq, dk, dv in the accumulators' dtype."""
        dtype, kv_heads = accumulator_dtype(q.dtype), k.shape[2]
        dq = torch.empty(q.shape, dtype=dtype, device=q.device)
        # By head in memory: a chunk's sums are then plain matrices.
        dk, dv = (torch.zeros(x.transpose(1, 2).shape, dtype=dtype, device=x.device) for x in (k, v))
        height, width, chunks = _partition(q, k)
        for b, chunk in chunks:
            q_chunk, dout_chunk, dq_chunk = (_queries(x[b], kv_heads, chunk) for x in (q, dout, dq))
            delta_chunk = row_term[b].transpose(0, 1).unflatten(0, (kv_heads, -1))[chunk]
            lse_chunk = lse[b].unflatten(0, (kv_heads, -1))[chunk]
            k_chunk, v_chunk = (_keys(x[b], chunk, dtype) for x in (k, v))
            for row_of_blocks in _blocks(shape, height, width):
                rows = row_of_blocks[0].rows
                dq_chunk[:, :, rows] = _backward_rows(
                    q_chunk[:, :, rows],
                    k_chunk,
                    v_chunk,
                    row_of_blocks,
                    scores,
                    dout=dout_chunk[:, :, rows],
                    delta=delta_chunk[:, :, rows],
                    lse=lse_chunk[:, :, rows],
                    dk=dk[b, chunk],
                    dv=dv[b, chunk],
                )
        return dq, dk.transpose(1, 2), dv.transpose(1, 2)


def _forward_rows(q: Tensor, k: Tensor, v: Tensor, blocks: list[_Block], scores: Scores) -> tuple[Tensor, Tensor]:
    """Attend from rows `q [HK, G, n, D]` to the blocks' columns of `k, v [HK, m, D]`: out `[HK, G, n, Dv]`, lse."""
    kv_heads, group, n, _ = q.shape
    scaled = _scaled(q, k.dtype, scores)
    # Finite, so that rows that have seen nothing yet give exp(-inf - top) = 0 and not NaN.
    top = torch.full((kv_heads, group * n, 1), torch.finfo(k.dtype).min, dtype=k.dtype, device=k.device)
    total = torch.zeros_like(top)
    out = torch.zeros(kv_heads, group * n, v.shape[-1], dtype=k.dtype, device=k.device)
    for block in blocks:
        s = _scores(scaled, k[:, block.columns], scores)
        if not block.full:
            s.view(kv_heads, group, n, block.m).masked_fill_(_hidden(block, s.device), float("-inf"))
        new_top = torch.maximum(top, s.amax(-1, keepdim=True))
        p = s.sub_(new_top).exp_()
        shrink = (top - new_top).exp_()
        total.mul_(shrink).add_(p.sum(-1, keepdim=True))
        out.mul_(shrink).baddbmm_(p, v[:, block.columns])
        top = new_top
    # A row's largest term is exp(0), so total >= 1 once it has seen a key.
    out /= total.clamp_min(1)
    return out.view(kv_heads, group, n, -1), (top + total.log()).view(kv_heads, group, n)


def _backward_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: list[_Block],
    scores: Scores,
    *,
    dout: Tensor,
    delta: Tensor,
    lse: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> Tensor:
    """Return dq `[HK, G, n, D]` of the rows and add to `dk, dv [HK, m, D]`.

    With x = factor q.k and s = x, or s = c tanh(x) under a softcap c (factor = scale / c): p = exp(s - lse),
    dx = p (dout.v - delta) ds/dx, where ds/dx = c - s^2 / c.
    """
    kv_heads, group, n, head_dim = q.shape
    scaled = _scaled(q, k.dtype, scores)
    dout = dout.to(k.dtype).reshape(kv_heads, group * n, -1)
    delta, lse = (x.to(k.dtype).reshape(kv_heads, group * n, 1) for x in (delta, lse))
    dq = torch.zeros_like(scaled)
    for block in blocks:
        k_block, v_block = k[:, block.columns], v[:, block.columns]
        s = _scores(scaled, k_block, scores)
        p = (s.sub_(lse) if scores.softcap is None else s - lse).exp_()
        if not block.full:  # zeroed, not multiplied: a hidden score may be far above lse and p be inf
            p.view(kv_heads, group, n, block.m).tril_(block.hi).triu_(block.lo)
        dv[:, block.columns].baddbmm_(p.transpose(1, 2), dout)
        dx = torch.bmm(dout, v_block.transpose(1, 2)).sub_(delta).mul_(p)
        if scores.softcap is not None:
            dx.mul_(s.square_().div_(-scores.softcap).add_(scores.softcap))
        dq.baddbmm_(dx, k_block)
        dk[:, block.columns].baddbmm_(dx.transpose(1, 2), scaled)
    return dq.mul_(_factor(scores)).view(kv_heads, group, n, head_dim)


def _factor(scores: Scores) -> float:
    return scores.softmax_scale / (scores.softcap or 1.0)


def _scaled(q: Tensor, dtype: torch.dtype, scores: Scores) -> Tensor:
    """Return `factor q` as `[HK, G n, D]`: the query heads of a KV head become rows, so K and V are not repeated."""
    return (q.to(dtype) * _factor(scores)).reshape(q.shape[0], -1, q.shape[-1])


def _scores(scaled: Tensor, k: Tensor, scores: Scores) -> Tensor:
    x = torch.bmm(scaled, k.transpose(1, 2))
    return x if scores.softcap is None else x.tanh_().mul_(scores.softcap)


def _queries(x: Tensor, kv_heads: int, chunk: slice) -> Tensor:
    """Return a view `[HK, G, T, D]` of a chunk of KV heads of `[T, H, D]`."""
    return x.unflatten(1, (kv_heads, -1))[:, chunk].permute(1, 2, 0, 3)


def _keys(x: Tensor, chunk: slice, dtype: torch.dtype) -> Tensor:
    """Return a chunk of KV heads of `[T, HK, D]` as contiguous `[HK, T, D]`."""
    return x[:, chunk].transpose(0, 1).to(dtype).contiguous()


def _partition(q: Tensor, k: Tensor) -> tuple[int, int, Iterator[tuple[int, slice]]]:
    """Return a block's height and width, and the (batch row, KV heads) that are computed together."""
    kv_heads, group = k.shape[2], q.shape[2] // k.shape[2]
    rows, width, scores = BLOCKS.get(q.device.type, BLOCKS["cuda"])
    height = max(rows // group, 1)
    heads = max(scores // (group * min(height, q.shape[1]) * min(width, k.shape[1])), 1)
    chunks = ((b, slice(h, h + heads)) for b in range(q.shape[0]) for h in range(0, kv_heads, heads))
    return height, width, chunks


def _blocks(shape: Rectangle, height: int, width: int) -> Iterator[list[_Block]]:
    """Cut a rectangle into rows of blocks, leaving out columns that no row of theirs sees."""
    n, m = shape.q_count, shape.k_count
    lo, hi = {"full": (1 - n, m - 1), "causal": (1 - n, 0), "band": (shape.lo, shape.hi)}[shape.kind]
    for begin in range(0, n, height):
        rows = slice(begin, min(begin + height, n))
        first, end = max(0, begin + lo), min(m, rows.stop + hi)
        columns = [slice(c, min(c + width, end)) for c in range(first, end, width)]
        yield [_Block(rows, c, lo + begin - c.start, hi + begin - c.start) for c in columns]


@lru_cache(maxsize=32)
def _hidden_by_band(n: int, m: int, lo: int, hi: int, device: str) -> Tensor:
    # int32: as large as the scores of one head and not twice that.
    columns, rows = (torch.arange(count, dtype=torch.int32, device=device) for count in (m, n))
    difference = columns[None, :] - rows[:, None]
    return (difference < lo) | (difference > hi)


def _hidden(block: _Block, device: torch.device) -> Tensor:
    """Return what no row of a block sees, bool `[n, m]`."""
    return _hidden_by_band(block.n, block.m, block.lo, block.hi, str(device))
