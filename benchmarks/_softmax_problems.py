"""What the GPU benchmark of softmax attention computes: hops of several layouts and masks, and their peers' masks."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from longctx.kernels.mask import Mask, causal, documents, sliding_window
from longctx.kernels.positions import Tile, cut, total_pairs
from longctx.kernels.tiles import tiles_between
from longctx.parallel.layout import Layout

FlexMask = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Problem:
    """One hop: queries of one rank of a layout against keys of another.

    Attributes:
        family: rows of the table that belong together.
        total: tokens of the whole sequence.
        ranks: of the queries and of the keys.
        bounds: of packed documents, None = one document.
        window: keys that a query sees, itself included; None = all before it.
    """

    family: str
    total: int
    layout: Layout
    ranks: tuple[int, int] = (0, 0)
    bounds: tuple[int, ...] | None = None
    window: int | None = None

    @property
    def tokens(self) -> int:
        """Return the tokens of one rank."""
        return self.total // self.layout.cp

    @property
    def name(self) -> str:
        """Name it in a table."""
        return f"{self.family}, {self.tokens // 1024}K" if self.tokens >= 1024 else f"{self.family}, {self.tokens}"

    @property
    def mask(self) -> Mask:
        """Return who sees whom, in global positions."""
        mask = causal() if self.window is None else sliding_window(self.window - 1)
        return mask if self.bounds is None else mask & documents(self.bounds)

    @cached_property
    def tiles(self) -> tuple[Tile, ...]:
        """Return the hop's tiles."""
        bounds = self.mask.bounds(self.total)
        queries, keys = (cut(self.layout.segments(rank, self.total), bounds) for rank in self.ranks)
        return tiles_between(queries, keys, mask=self.mask, total=self.total)

    @property
    def pairs(self) -> int:
        """Return the visible pairs of one head."""
        return total_pairs(self.tiles)

    @property
    def shift(self) -> int | None:
        """Return d where row i sees the columns up to i - d and nothing else limits it: causal attention, shifted."""
        if len(self.tiles) != 1:
            return None
        tile = self.tiles[0]
        square = tile.q_count == tile.k_count == self.tokens and tile.lo <= 1 - tile.q_count
        return -tile.hi if square and tile.hi <= 0 else None

    def flex(self, device: torch.device) -> FlexMask:
        """Return the same mask as flex_attention takes it."""
        q_at, k_at = (self.layout.positions(rank, self.total).to(device) for rank in self.ranks)
        bounds = torch.tensor((self.bounds or (0, self.total))[1:-1], dtype=torch.int64)
        q_document, k_document = (torch.bucketize(x.cpu(), bounds, right=True).to(device) for x in (q_at, k_at))
        window = self.total if self.window is None else self.window

        def seen(_: Tensor, __: Tensor, i: Tensor, j: Tensor) -> Tensor:
            distance = q_at[i] - k_at[j]
            return (distance >= 0) & (distance < window) & (q_document[i] == k_document[j])

        return seen


def problems(smoke: bool) -> list[Problem]:
    """Return all of them; for a smoke test of 64 tokens a rank."""
    k = 16 if smoke else 1024
    lengths = (8, 16, 32, 64, 128) if not smoke else (8,)
    one, striped, zigzag = Layout("contiguous", 1), Layout("striped", 4), Layout("zigzag", 4)
    bounds = packed(64 * k if not smoke else 8 * k, mean=4 * k)
    return [
        *(Problem("causal", n * k, one) for n in lengths),
        Problem("striped hop, shifted causal", lengths[-1] * k, striped, (0, 1)),
        Problem("zigzag, own shard", lengths[-1] * k, zigzag, (1, 1)),
        Problem("zigzag, earlier rank", lengths[-1] * k, zigzag, (2, 1)),
        Problem("packed documents of 4K", bounds[-1], one, bounds=bounds),
        Problem("window of 4K", lengths[-1] * k, one, window=4 * k if not smoke else k),
    ]


def packed(total: int, *, mean: int) -> tuple[int, ...]:
    """Return bounds of documents whose lengths are drawn from an exponential distribution, always the same."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.empty(8 * total // mean).exponential_(1 / mean, generator=generator).ceil().long().tolist()
    return (0, *(end for end in accumulate(draws) if end < total), total)
