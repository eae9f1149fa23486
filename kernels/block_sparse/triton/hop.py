"""From a selection and the keys at hand to what the kernels of sparse attention read: pairs, pieces, arguments."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longctx.kernels.block_sparse.contract import Weights
from longctx.kernels.block_sparse.lanes import Lanes, lanes_of, to_lanes
from longctx.kernels.block_sparse.pairs import Pairs, pairs_of, pieces_of
from longctx.kernels.block_sparse.selection import Selection
from longctx.kernels.contract import Scores
from longctx.kernels.softmax.memory import dense_heads
from longctx.kernels.softmax.triton.tile_table import Blocks
from longctx.kernels.triton_common.launch import cdiv
from longctx.kernels.triton_common.tile_table import block

MAX_HEAD_DIM = 256
# Pairs times heads whose results exist at a time: times the head dim and 4 bytes, 512 MiB at head dim 128.
ROWS_AT_ONCE = 1 << 20


@dataclass(frozen=True, eq=False, kw_only=True)
class Hop:
    """Queries and the keys at hand, in lanes.

    Attributes:
        q: `[B, T, H, D]` without gaps.
        k, v: `[B, lanes per row, Tk, .]`, the last dim without gaps.
        heads: HS; group: query heads of each of these.
        precision: of matrix products.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    lanes: Lanes
    heads: int
    group: int
    kv_heads: int
    weights: Weights
    scores: Scores
    precision: str

    def pairs(self, width: int) -> Iterator[Pairs]:
        """Yield the pairs with tiles of `width` keys."""
        return pairs_of(
            self.lanes,
            batch=self.q.shape[0],
            kv_heads=self.kv_heads,
            width=width,
            tiles_per_lane=self.tiles(width),
            at_once=max(ROWS_AT_ONCE // self.group, 1),
        )

    def tiles(self, width: int) -> int:
        """Return how many tiles a lane has."""
        return cdiv(self.k.shape[2], width)

    def arguments(self, blocks: Blocks, width: int) -> dict[str, Any]:
        """Return what forward and backward kernels have in common but for the pairs."""
        head_dim, value_dim, cap = self.q.shape[-1], self.v.shape[-1], self.scores.softcap
        named = (("k", self.k), ("v", self.v))
        strides = {f"{name}{dim}": x.stride(place) for name, x in named for place, dim in enumerate("blt")}
        return strides | {
            "q": self.q,
            "k": self.k,
            "v": self.v,
            "factor": self.scores.softmax_scale / (cap or 1.0),
            "softcap": cap or 1.0,
            "k_tokens": self.k.shape[2],
            "per_lane": self.tiles(width),
            "lanes": self.k.shape[1],
            "G": self.group,
            "D": head_dim,
            "DV": value_dim,
            "WIDTH": width,
            "BM": blocks.queries,
            "BN": block(width, blocks.keys),
            "BD": block(head_dim, MAX_HEAD_DIM),
            "BV": block(value_dim, MAX_HEAD_DIM),
            "SOFTCAP": cap is not None,
            "SUM": self.weights == "sum",
            "PRECISION": self.precision,
        }


def hop_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    selection: Selection,
    k_positions: Tensor,
    weights: Weights,
    scores: Scores,
    precision: str,
) -> Hop:
    """Lay keys out in lanes; without classes, where their positions ascend, they are read where they are."""
    lanes, heads = lanes_of(selection, k_positions), selection.heads
    keys, values = (
        dense_heads(x).transpose(1, 2) if lanes.order is None else to_lanes(x, lanes, heads=heads) for x in (k, v)
    )
    return Hop(
        q=q.contiguous(),
        k=keys,
        v=values,
        lanes=lanes,
        heads=heads,
        group=q.shape[2] // heads,
        kv_heads=k.shape[2],
        weights=weights,
        scores=scores,
        precision=precision,
    )


class Launch(NamedTuple):
    """Some pieces that one launch is for.

    Attributes:
        items: int64 `[N2, 3]`: the tile of keys of each, and the bounds of its rows.
        masked: whether some rows see only a part of their tile.
        begins: int64 `[NG + 1]`: the items of each group; groups: int64 `[NG]`, their tiles of keys.
    """

    items: Tensor
    masked: bool
    begins: Tensor
    groups: Tensor


def launches_of(pairs: Pairs, most: int, *, heads: int) -> Iterator[Launch]:
    """Yield those that see whole tiles, then the others, in pieces of at most `most` rows."""
    pieces = pieces_of(pairs, most, heads=heads)
    items = torch.stack([pieces.tiles, pieces.begin, pieces.end], dim=1)
    if pieces.full:
        yield Launch(items[: pieces.full], False, pieces.first[: pairs.full + 1], pairs.groups[: pairs.full])
    if pieces.full < len(items):
        begins = pieces.first[pairs.full :] - pieces.full
        yield Launch(items[pieces.full :], True, begins, pairs.groups[pairs.full :])


def pair_arguments(pairs: Pairs) -> dict[str, Tensor]:
    """Return the pairs' integers as kernels name them, int64 `[P]`."""
    return {"rows": pairs.rows[pairs.place], "numbers": pairs.number, "los": pairs.lo, "his": pairs.hi}


def even(size: int, most: int, *, keys: int) -> int:
    """Return the width of tiles that blocks of `size` are cut into, evenly; small blocks share one of up to 16.

    Where there are but a few keys, summaries of blocks for instance, it is no wider than them.
    """
    width = size * (16 // size) if size < 16 else size // cdiv(size, most)
    return min(width, block(keys, most))
