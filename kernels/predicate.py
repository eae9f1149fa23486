"""Predicates: masks that no band can express, evaluated pair by pair.

They cost one evaluation of every pair, so they are for the reference kernel and for experiments. A tile under a
predicate carries the functions and its positions, so that a kernel can evaluate it without knowing any rank.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from longctx.kernels.positions import Segment

# int64 positions of queries [Tq, 1] and keys [1, Tk] -> bool, broadcast to [Tq, Tk]
Predicate = Callable[[Tensor, Tensor], Tensor]
PAIRS_AT_ONCE = 1 << 22


def evaluate(functions: Sequence[Predicate], q_positions: Tensor, k_positions: Tensor) -> Tensor:
    """Return which pairs all functions let through: int64 `[Tq]`, `[Tk]` -> bool `[Tq, Tk]`, on the positions' device.

    Raises:
        ValueError: a function returned something else than a bool tensor that broadcasts to `[Tq, Tk]`.
    """
    shape = (q_positions.shape[0], k_positions.shape[0])
    seen = torch.ones(shape, dtype=torch.bool, device=q_positions.device)
    for function in functions:
        got = function(q_positions[:, None], k_positions[None, :])
        if not isinstance(got, Tensor) or got.dtype != torch.bool:
            what = got.dtype if isinstance(got, Tensor) else type(got).__name__
            raise ValueError(f"a mask predicate must return a bool tensor; {function} returned {what}")
        try:
            seen &= got.to(seen.device).expand(shape)
        except RuntimeError as error:
            raise ValueError(
                f"a mask predicate must broadcast to [Tq, Tk] = {shape}; {function} returned {tuple(got.shape)}"
            ) from error
    return seen


@dataclass(frozen=True, slots=True)
class TilePredicate:
    """What a tile needs to evaluate predicates: the functions, and the positions of its rows and columns."""

    functions: tuple[Predicate, ...]
    q: "Segment"
    k: "Segment"

    def visible(self, *, device: torch.device | str) -> Tensor:
        """Return bool `[q.count, k.count]`, without any band."""
        return evaluate(self.functions, _positions(self.q, device), _positions(self.k, device))

    def count(self, *, lo: int, hi: int) -> int:
        """Count the visible pairs with `lo <= j - i <= hi`, some rows at a time."""
        rows = max(PAIRS_AT_ONCE // self.k.count, 1)
        total = 0
        for begin in range(0, self.q.count, rows):
            q = self.q.part(begin, min(begin + rows, self.q.count))
            seen = evaluate(self.functions, _positions(q, "cpu"), _positions(self.k, "cpu"))
            seen &= band(q.count, self.k.count, lo=lo + begin, hi=hi + begin, device="cpu")
            total += int(seen.sum())
        return total


def band(rows: int, columns: int, *, lo: int, hi: int, device: torch.device | str) -> Tensor:
    """Return `lo <= j - i <= hi` as bool `[rows, columns]`."""
    difference = torch.arange(columns, device=device)[None, :] - torch.arange(rows, device=device)[:, None]
    return (difference >= lo) & (difference <= hi)


def _positions(segment: "Segment", device: torch.device | str) -> Tensor:
    return segment.start + segment.stride * torch.arange(segment.count, dtype=torch.int64, device=device)
