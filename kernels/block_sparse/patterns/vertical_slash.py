"""Vertical-slash and A-shape patterns of MInference (arXiv 2407.02490): some columns, some diagonals, a window."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from longctx.kernels.block_sparse.patterns.counts import rounded, triangle
from longctx.kernels.block_sparse.patterns.pattern import Slot, select, tile_width, where_queries_are
from longctx.kernels.block_sparse.selection import Selection

Offsets = tuple[int, ...] | tuple[tuple[int, ...], ...]


class Run(NamedTuple):
    """The integers from `begin` to `end`, inclusive."""

    begin: int
    end: int


EMPTY = Run(1, 0)


@dataclass(frozen=True, kw_only=True)
class VerticalSlash:
    """Let query i see `i - j < window`, j of `vertical`, and `i - j` of `slash`, all with `0 <= j <= i`.

    Attributes:
        vertical: positions in a document that all later queries see; those of all heads, or a tuple for each KV head.
        slash: distances of diagonals; the same. Neighbours make a band, which is one slot.
        window: last tokens that a query sees, itself among them.
    """

    vertical: Offsets = ()
    slash: Offsets = ()
    window: int

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"window must be >= 1; given {self.window}")
        for name in ("vertical", "slash"):
            for offset in (x for some in _by_head(getattr(self, name)) for x in some):
                if offset < 0:
                    raise ValueError(f"{name} must be offsets >= 0; given {offset}")

    def selection(self, *, positions: Tensor, document_of: Tensor, num_heads: int, num_kv_heads: int) -> Selection:
        """Return what the queries at `positions` see; see `Pattern`."""
        here, first = (x[..., None] for x in where_queries_are(positions, document_of))  # [R, T, 1, 1]
        columns, bands = self._runs()
        for name, runs in (("vertical", columns), ("slash", bands)):
            if len(runs) not in (1, num_kv_heads):
                raise ValueError(
                    f"{name} has offsets for {len(runs)} KV heads, there are {num_kv_heads}: give one tuple for each, "
                    "or one for all"
                )
        begins, ends = _tensors(columns, device=here.device)  # [1 or HK, runs]
        least, most = _tensors(bands, device=here.device)
        lo = _together(first + begins, torch.maximum(first, here - most))
        hi = _together(torch.minimum(first + ends, here), here - least)
        lo, hi = disjoint(lo, hi)
        slots = [Slot(*some) for some in zip(lo.unbind(-1), hi.unbind(-1), strict=True)]
        width = tile_width(self.window) if not any(_by_head(self.slash)) else tile_width(1)
        return select(slots, heads=num_kv_heads, block_size=width)

    def pairs(self, begin: int, length: int) -> int:
        """Return visible pairs; see `Pattern`."""
        columns, bands = self._runs()
        heads = max(len(columns), len(bands))
        total = sum(_pairs(length, columns[head % len(columns)], bands[head % len(bands)]) for head in range(heads))
        return rounded(total, heads)

    def _runs(self) -> tuple[list[list[Run]], list[list[Run]]]:
        """Return columns and bands, the window among them, by head, or of one for all."""
        columns = [_runs_of(some) for some in _by_head(self.vertical)]
        return columns, [_runs_of(some, Run(0, self.window - 1)) for some in _by_head(self.slash)]


def a_shape(*, first: int, window: int) -> VerticalSlash:
    """Return the A-shape: the first tokens of the document, and the last ones (StreamingLLM, arXiv 2309.17453)."""
    return VerticalSlash(vertical=tuple(range(first)), window=window)


def disjoint(lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
    """Return intervals `[..., S]`, both ends inclusive, with the same union and no common element, in order.

    Each keeps what none before it has; those that keep nothing have `hi < lo`.
    """
    empty = hi < lo
    lo, order = torch.where(empty, 0, lo).sort(dim=-1)
    hi = torch.where(empty, -1, hi).gather(-1, order)
    reach = torch.cat([torch.full_like(hi[..., :1], -1), hi.cummax(dim=-1).values[..., :-1]], dim=-1)
    return torch.maximum(lo, reach + 1), hi


def _by_head(offsets: Offsets) -> Sequence[tuple[int, ...]]:
    if offsets and isinstance(offsets[0], tuple):
        return offsets  # type: ignore[return-value]
    return (offsets,)  # type: ignore[return-value]


def _runs_of(offsets: Sequence[int], *others: Run) -> list[Run]:
    """Return the longest runs of neighbours among these integers and those of other runs, in order."""
    runs: list[Run] = []
    for run in sorted([*others, *(Run(offset, offset) for offset in offsets)]):
        if runs and run.begin <= runs[-1].end + 1:
            runs[-1] = Run(runs[-1].begin, max(runs[-1].end, run.end))
        else:
            runs.append(run)
    return runs


def _tensors(runs: list[list[Run]], *, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return where runs begin and end, int64 `[heads, most runs]`; heads with fewer have empty ones."""
    most = max(len(some) for some in runs)
    full = torch.tensor([some + [EMPTY] * (most - len(some)) for some in runs], device=device, dtype=torch.int64)
    full = full.reshape(len(runs), most, 2)
    return full[..., 0], full[..., 1]


def _together(a: Tensor, b: Tensor) -> Tensor:
    shape = torch.broadcast_shapes(a.shape[:3], b.shape[:3])
    return torch.cat([a.expand(*shape, -1), b.expand(*shape, -1)], dim=-1)


def _pairs(length: int, columns: list[Run], bands: list[Run]) -> int:
    """Count the pairs of the bands, and those of the columns whose distance is of no band."""
    total = 0
    for band in bands:
        total += triangle(max(length - band.begin, 0)) - triangle(max(length - band.end - 1, 0))
    for place in (place for run in columns for place in range(run.begin, min(run.end + 1, length))):
        later = length - place  # distances 0 to later - 1
        total += later - sum(max(min(band.end + 1, later) - band.begin, 0) for band in bands)
    return total
