"""Masks on global positions: who may see whom. One value type, closed under `&`.

A mask says that the query at position p sees the keys at positions in `[p - left, p + right]` of its own document. That
covers full, causal, sliding-window and packed-document masks and every `&` of them, and becomes a band on any two
segments of equal stride (`tiles.py`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from longctx.kernels.positions import check_bounds


@dataclass(frozen=True)
class Mask:
    """Visible keys of a query at position p: `p - left <= k <= p + right`, same document.

    Attributes:
        left: how many earlier keys a query sees; None = all of them.
        right: how many later keys a query sees; None = all of them, 0 = causal.
        cu_seqlens: document bounds from 0 to the number of tokens; None = one document.
    """

    left: int | None = None
    right: int | None = None
    cu_seqlens: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name, value in (("left", self.left), ("right", self.right)):
            if value is not None and value < 0:
                raise ValueError(f"mask {name} must be >= 0 or None; given {value}")
        if self.cu_seqlens is not None:
            check_bounds(self.cu_seqlens, total=self.cu_seqlens[-1] if self.cu_seqlens else 0)

    def __and__(self, other: "Mask") -> "Mask":
        """Return the mask that lets through what both let through."""
        bounds = self.cu_seqlens or other.cu_seqlens
        if self.cu_seqlens and other.cu_seqlens:
            if self.cu_seqlens[-1] != other.cu_seqlens[-1]:
                raise ValueError(
                    f"cannot combine documents of {self.cu_seqlens[-1]} tokens with documents of {other.cu_seqlens[-1]}"
                )
            bounds = tuple(sorted({*self.cu_seqlens, *other.cu_seqlens}))
        return Mask(_smaller(self.left, other.left), _smaller(self.right, other.right), bounds)

    def bounds(self, total: int) -> tuple[int, ...]:
        """Return the document bounds of a sequence of `total` tokens, checked."""
        if self.cu_seqlens is None:
            return (0, total)
        check_bounds(self.cu_seqlens, total=total)
        return self.cu_seqlens

    def allowed(self, q_positions: Tensor, k_positions: Tensor) -> Tensor:
        """Evaluate the mask densely: int64 `[Tq]`, `[Tk]` -> bool `[Tq, Tk]`. For references and tests."""
        difference = k_positions[None, :] - q_positions[:, None]
        seen = torch.ones_like(difference, dtype=torch.bool)
        if self.left is not None:
            seen &= difference >= -self.left
        if self.right is not None:
            seen &= difference <= self.right
        if self.cu_seqlens is not None:
            inner = torch.tensor(self.cu_seqlens[1:-1], dtype=torch.int64, device=difference.device)
            q_document = torch.bucketize(q_positions, inner, right=True)
            k_document = torch.bucketize(k_positions, inner, right=True)
            seen &= q_document[:, None] == k_document[None, :]
        return seen


def full() -> Mask:
    """Let every query see every key (bidirectional)."""
    return Mask()


def causal() -> Mask:
    """Let a query see itself and what comes before it."""
    return Mask(right=0)


def sliding_window(left: int | None, right: int | None = 0) -> Mask:
    """Let a query see `left` keys before it, itself, and `right` keys after it (None = all)."""
    return Mask(left=left, right=right)


def documents(cu_seqlens: tuple[int, ...]) -> Mask:
    """Let a query see its own document only; `cu_seqlens` goes from 0 to the number of tokens."""
    return Mask(cu_seqlens=tuple(cu_seqlens))


def _smaller(a: int | None, b: int | None) -> int | None:
    if a is None or b is None:
        return b if a is None else a
    return min(a, b)
