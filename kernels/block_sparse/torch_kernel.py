"""Selected attention in plain torch: queries gathered by the tile of keys that they visit, batched matrix products.

Arithmetic is proportional to what is selected, memory to the number of tokens: partial results exist for
`PAIRS_AT_ONCE` pairs at a time. All of it is in the accumulators' dtype. Any device, dtype, head dims, softcap, gates.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from longctx.kernels.block_sparse.contract import Weights
from longctx.kernels.block_sparse.lanes import Lanes, add_from_lanes, lanes_of, to_lanes
from longctx.kernels.block_sparse.pairs import Pairs, pairs_of, pieces_of
from longctx.kernels.block_sparse.selection import Selection
from longctx.kernels.block_sparse.turns import Turns, take
from longctx.kernels.block_sparse.weights import RowTerms, scores_of, slope_of, softmax_backward, softmax_forward
from longctx.kernels.contract import Request, Scores
from longctx.kernels.merge import Partial, accumulator_dtype, merge_into

PAIRS_AT_ONCE = 1 << 18  # times the head dim, these are the partial results that exist at a time
# Queries of a tile, of which most groups fill several, so that little is empty.
HEIGHTS = (8, 16, 32, 64, 128, 256)
# Keys of a tile at most, and the scores of the tiles that are computed together: on a CPU they stay in its caches.
WIDTH = 512
SCORES_AT_ONCE = {"cpu": 1 << 19, "cuda": 1 << 26}


class TorchSparseKernel:
    """Gather, multiply, merge."""

    name = "torch"

    def unsupported(self, request: Request, weights: Weights) -> str | None:
        """Serve everything."""
        return None

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        selection: Selection,
        k_positions: Tensor,
        weights: Weights,
        gates: Tensor | None,
        scores: Scores,
        partial: Partial,
    ) -> None:
        """Merge into `partial`; see the contract."""
        assert weights != "sum" or scores.softcap is None, "a sum has no scores to cap"
        hop = _Hop(q, k, selection, k_positions, weights)
        keys, values = hop.tiles(k), hop.tiles(v)
        queries, group = hop.rows(q), hop.group
        out = queries.new_zeros(*queries.shape[:2], v.shape[-1], dtype=hop.wide)  # [B T HS, G, Dv]
        lse = queries.new_full(queries.shape[:2], float("-inf"), dtype=hop.wide)
        logits = None if gates is None else hop.rows(gates)
        for pairs in hop.pairs():
            # The last place is for nobody.
            turn_out = out.new_empty(pairs.count + 1, group, v.shape[-1])
            turn_lse = lse.new_empty(pairs.count + 1, group)
            for tile, some in hop.batches(pairs):
                s = scores_of(_tiled(take(queries, some.rows).to(hop.wide), len(tile)), take(keys, tile), scores)
                if weights == "sum":
                    part = torch.bmm(some.hide(s, group, 0.0), take(values, tile))
                else:
                    part, own = softmax_forward(some.hide(s, group, float("-inf")), take(values, tile))
                    own = own.view(-1, group)
                    turn_lse[some.number] = own if logits is None else logits[some.rows, :, some.slot].to(hop.wide)
                turn_out[some.number] = part.view(-1, group, v.shape[-1])
            turns = Turns(pairs)
            if weights == "sum":
                out[turns.rows] = turns.summed(turn_out)
            else:
                out[turns.rows], lse[turns.rows] = turns.merged(turn_out, turn_lse)
        out = out.view(*q.shape[:3], -1)
        if weights == "sum":
            partial.out += out
        else:
            merge_into(partial, out, lse.view(q.shape[:3]).transpose(1, 2))

    def backward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        selection: Selection,
        k_positions: Tensor,
        weights: Weights,
        gates: Tensor | None,
        scores: Scores,
        dout: Tensor,
        delta: Tensor,
        lse: Tensor,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
        dgates: Tensor | None,
    ) -> None:
        """Add to `dq, dk, dv, dgates`; see the contract."""
        assert weights != "sum" or scores.softcap is None, "a sum has no scores to cap"
        hop = _Hop(q, k, selection, k_positions, weights)
        keys, values = hop.tiles(k), hop.tiles(v)
        queries, douts, group = hop.rows(q), hop.rows(dout), hop.group
        dqueries = torch.zeros(queries.shape, dtype=hop.wide, device=q.device)
        dkeys, dvalues = torch.zeros_like(keys), torch.zeros_like(values)
        logits, dlogits = None, None
        if gates is not None:
            logits = hop.rows(gates)
            dlogits = torch.zeros(logits.shape, dtype=hop.wide, device=q.device)
        terms = None
        if weights != "sum":
            terms = [hop.rows(x.transpose(1, 2)[..., None])[..., 0] for x in (lse, delta)]
        for pairs in hop.pairs():
            for tile, some in hop.batches(pairs):
                n = len(tile)
                q_rows, dout_rows = (_tiled(take(x, some.rows).to(hop.wide), n) for x in (queries, douts))
                k_tile, v_tile = take(keys, tile), take(values, tile)
                s = scores_of(q_rows, k_tile, scores)
                if terms is None:
                    alive = _column(some.real[:, None].expand(-1, group), n)
                    p = some.hide(s, group, 0.0).mul_(alive)
                    ds = some.hide(torch.bmm(dout_rows, v_tile.transpose(1, 2)), group, 0.0).mul_(alive)
                else:
                    gate = None if logits is None else _column(logits[some.rows, :, some.slot].to(hop.wide), n)
                    # Nobody's rows have weight 0.
                    row_lse = take(terms[0], some.rows).masked_fill(~some.real[:, None], float("inf"))
                    rows = RowTerms(_column(row_lse, n), _column(take(terms[1], some.rows), n), gate)
                    slope = slope_of(s, scores)
                    s = some.hide(s, group, float("-inf"))
                    p, ds, dgate = softmax_backward(s, v_tile, dout_rows, rows)
                    if slope is not None:
                        ds *= slope
                    if dgate is not None and dlogits is not None:
                        real = some.real
                        dlogits[some.rows[real], :, some.slot[real]] = dgate.view(-1, group)[real]
                ds *= scores.softmax_scale
                _add(dvalues, tile, torch.bmm(p.transpose(1, 2), dout_rows))
                _add(dkeys, tile, torch.bmm(ds.transpose(1, 2), q_rows))
                _add(dqueries, some.rows, torch.bmm(ds, k_tile).view(-1, group, q.shape[-1]))
        dq += dqueries.view(dq.shape)
        add_from_lanes(hop.untiled(dkeys), hop.lanes, into=dk)
        add_from_lanes(hop.untiled(dvalues), hop.lanes, into=dv)
        if dgates is not None and dlogits is not None:
            dgates += dlogits.view(dgates.shape)


class _Some:
    """Some tiles of queries: their rows one after the other, nobody's among them.

    Args:
        members: int64 `[n, height]`, the pairs of each tile of queries, -1 where there are fewer.
        masked: whether some see only a part of their tile of keys.
    """

    def __init__(self, pairs: Pairs, members: Tensor, *, masked: bool) -> None:
        self._shape = members.shape
        members = members.flatten()
        self.real = members >= 0
        chosen = members.clamp(min=0)
        self.rows = take(pairs.rows, take(pairs.place, chosen))
        self.slot = take(pairs.slot, chosen)
        self.number = torch.where(self.real, take(pairs.number, chosen), pairs.count)
        self._bounds = (take(pairs.lo, chosen), take(pairs.hi, chosen)) if masked else None

    def hide(self, s: Tensor, group: int, value: float) -> Tensor:
        """Set what rows do not see of `s [N, height G, width]`, in place."""
        if self._bounds is None:
            return s
        lo, hi = (x.view(*self._shape, 1, 1) for x in self._bounds)
        column = torch.arange(s.shape[-1], device=s.device)
        s.view(*self._shape, group, -1).masked_fill_((column < lo) | (column >= hi), value)
        return s


class _Hop:
    """The keys at hand in lanes and tiles, and the pairs of queries that visit them."""

    def __init__(self, q: Tensor, k: Tensor, selection: Selection, k_positions: Tensor, weights: Weights) -> None:
        self._batch, self._heads = q.shape[0], selection.heads
        self._kv_heads, self._keys = k.shape[2], k.shape[1]
        self.group = q.shape[2] // selection.heads
        self.wide = accumulator_dtype(q.dtype)
        self.lanes: Lanes = lanes_of(selection, k_positions)
        # With gates a slot is one tile. Blocks that are larger than a tile are cut evenly.
        block = selection.block_size
        self._width = block if weights == "gated" else block // max(-(-block // WIDTH), 1)
        self._per_lane = -(-self._keys // self._width)

    def tiles(self, x: Tensor) -> Tensor:
        """Return `x [B, Tk, HK, D]` as tiles `[lanes x tiles per lane, width, D]`, zeros behind a lane's last key."""
        by_lane = to_lanes(x, self.lanes, heads=self._heads).to(self.wide)
        by_lane = F.pad(by_lane, (0, 0, 0, self._per_lane * self._width - self._keys))
        return by_lane.view(-1, self._width, x.shape[-1])

    def untiled(self, x: Tensor) -> Tensor:
        """Return the inverse of `tiles`: `[B, lanes, Tk, D]`."""
        lanes = self._heads if self.lanes.per_head else self._kv_heads
        return x.view(self._batch, lanes, self._per_lane * self._width, x.shape[-1])[:, :, : self._keys]

    def rows(self, x: Tensor) -> Tensor:
        """Return `x [B, T, H, ...]` as `[B T HS, G, ...]`."""
        return x.contiguous().view(-1, self.group, *x.shape[3:])

    def pairs(self) -> Iterator[Pairs]:
        return pairs_of(
            self.lanes,
            batch=self._batch,
            kv_heads=self._kv_heads,
            width=self._width,
            tiles_per_lane=self._per_lane,
            at_once=max(PAIRS_AT_ONCE // self.group, 1),
        )

    def batches(self, pairs: Pairs) -> Iterator[tuple[Tensor, _Some]]:
        """Yield tiles of keys `[n]` with the tiles of queries that visit them, first those that need no mask."""
        height = _height(pairs)
        pieces = pieces_of(pairs, height)
        limit = SCORES_AT_ONCE.get(pairs.rows.device.type, SCORES_AT_ONCE["cuda"])
        step = max(limit // (height * self.group * self._width), 1)
        within = torch.arange(height, device=pairs.rows.device)
        for begin, end, masked in ((0, pieces.full, False), (pieces.full, len(pieces.tiles), True)):
            for first in range(begin, end, step):
                some = slice(first, min(first + step, end))
                members = pieces.begin[some, None] + within
                members = torch.where(members < pieces.end[some, None], members, -1)
                yield pieces.tiles[some], _Some(pairs, members, masked=masked)


def _height(pairs: Pairs) -> int:
    mean = pairs.count / max(len(pairs.groups), 1)
    return max((height for height in HEIGHTS if 2 * height <= mean), default=HEIGHTS[0])


def _tiled(x: Tensor, tiles: int) -> Tensor:
    """Return rows `[n height, G, D]` as `[n, height G, D]`."""
    return x.reshape(tiles, -1, x.shape[-1])


def _column(x: Tensor, tiles: int) -> Tensor:
    """Return what is per row, `[n height, G]`, as `[n, height G, 1]`."""
    return x.reshape(tiles, -1, 1)


def _add(target: Tensor, index: Tensor, values: Tensor) -> None:
    """Add values to the rows of a target in one order, so that sums are the same every time."""
    if target.device.type == "cpu":
        target.index_add_(0, index, values)
    else:  # index_add_ is atomic there, this one sorts
        target.index_put_((index,), values, accumulate=True)
