"""The vertical-slash pattern of MInference (arXiv 2407.02490): some columns, some diagonals, a window."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from longctx.kernels.block_sparse.patterns.counts import rounded, triangle
from longctx.kernels.block_sparse.patterns.pattern import Slot, select, tile_width, where_keys_are, where_queries_are
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
        """Return what the queries at `positions` see; see `Pattern`.

        Keys of columns are of class 1, which is one slot, and all others of class 0: a slot for each band.
        """
        here, first = where_queries_are(positions, document_of)
        columns, bands = _by_head(self.vertical), self._bands()
        for name, some in (("vertical", columns), ("slash", bands)):
            if len(some) not in (1, num_kv_heads):
                raise ValueError(
                    f"{name} has offsets for {len(some)} KV heads, there are {num_kv_heads}: give one tuple for each, "
                    "or one for all"
                )
        least, most = _tensors(bands, device=here.device)  # [1 or HK, bands]
        zero = torch.zeros_like(here)
        slots = [
            Slot(torch.maximum(first, here - far), here - near, zero)
            for near, far in zip(least.unbind(-1), most.unbind(-1), strict=True)
        ]
        slots.append(Slot(first, here, zero + 1))
        keys = where_keys_are(document_of)
        key_class = torch.stack([torch.isin(keys, keys.new_tensor(some)) for some in columns], dim=-1)
        width = tile_width(self.window) if not any(_by_head(self.slash)) else tile_width(1)
        return select(slots, heads=num_kv_heads, key_class=key_class, block_size=width)

    def pairs(self, begin: int, length: int) -> int:
        """Return visible pairs; see `Pattern`."""
        columns, bands = _by_head(self.vertical), self._bands()
        heads = max(len(columns), len(bands))
        total = sum(_pairs(length, columns[head % len(columns)], bands[head % len(bands)]) for head in range(heads))
        return rounded(total, heads)

    def _bands(self) -> list[list[Run]]:
        """Return the distances that are seen, the window among them, by head, or of one for all."""
        return [_runs_of(some, Run(0, self.window - 1)) for some in _by_head(self.slash)]


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


def _pairs(length: int, columns: Sequence[int], bands: list[Run]) -> int:
    """Count the pairs of the bands, and those of the columns whose distance is of no band."""
    total = 0
    for band in bands:
        total += triangle(max(length - band.begin, 0)) - triangle(max(length - band.end - 1, 0))
    for place in {place for place in columns if place < length}:
        later = length - place  # distances 0 to later - 1
        total += later - sum(max(min(band.end + 1, later) - band.begin, 0) for band in bands)
    return total
