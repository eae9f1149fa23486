"""Where linear layers run, and what a stack sends besides K/V: states, halos, relayouts. Integers only."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch

from longctx.attention_config import LEAST_STRIPE
from longctx.kernels.merge import accumulator_dtype
from longctx.mixers.layers import Layers
from longctx.mixers.shape import LinearShape, linear_shape
from longctx.parallel.chain import chain
from longctx.parallel.halo import halo_sent
from longctx.parallel.layout import Layout
from longctx.parallel.relayout import relayout_sent
from longctx.parallel.state_passing import StatePassing

MANY_RANKS = 32  # above, the first, the middle and the last one stand for all


@dataclass(frozen=True, kw_only=True)
class StackTraffic:
    """Bytes that one rank sends for one sequence, forward and backward; the rank that sends most.

    Attributes:
        relayouts: how often tokens change the layout in a forward pass.
    """

    states: int
    halos: int
    moved: int
    relayouts: int

    @property
    def total(self) -> int:
        """Return all of it."""
        return self.states + self.halos + self.moved


@dataclass(frozen=True, kw_only=True)
class StackShape:
    """A stack of layers over ranks, as far as traffic depends on it.

    Attributes:
        softmax_layout: of the softmax layers.
        total: tokens of a sequence.
        dim: width of the residual stream, which is what a relayout moves.
        heads, head_dim: the model's.
        dtype: of the arithmetic.
    """

    layers: Layers
    softmax_layout: Layout
    passing: StatePassing
    total: int
    dim: int
    heads: int
    head_dim: int
    dtype: torch.dtype

    def linear(self, kind: str) -> LinearShape:
        """Return the shape of a linear kind."""
        return linear_shape(self.layers, kind, heads=self.heads, head_dim=self.head_dim)

    @cached_property
    def linear_flops_per_token(self) -> int:
        """Return the model FLOPs of all recurrences for one token, forward and backward."""
        return sum(self.linear(self.layers.kinds[index]).flops_per_token for index in self.layers.linear)

    def layouts(self, states: Layout) -> tuple[Layout, ...]:
        """Return the layout of each layer, where the linear ones run in `states`."""
        linear = set(self.layers.linear)
        return tuple(states if index in linear else self.softmax_layout for index in range(len(self.layers.kinds)))

    def traffic(self, states: Layout) -> StackTraffic:
        """Count what is sent where the linear layers run in `states`."""
        changes = Counter((a, b) for a, b in pairwise(self.layouts(states)) if a != b and a.cp > 1)
        row = self.dim * self.dtype.itemsize

        def bytes_of(source: Layout, target: Layout, rank: int) -> int:
            return relayout_sent(source, target, rank=rank, total=self.total, row_bytes=row).bytes

        def moved(rank: int) -> int:
            return sum(n * (bytes_of(a, b, rank) + bytes_of(b, a, rank)) for (a, b), n in changes.items())

        kinds = Counter(self.layers.kinds[index] for index in self.layers.linear)
        return StackTraffic(
            states=sum(n * self._states(self.linear(kind), states) for kind, n in kinds.items()),
            halos=sum(n * self._halo(self.linear(kind), states) for kind, n in kinds.items()),
            moved=_most(moved, states.cp) if changes else 0,
            relayouts=changes.total(),
        )

    def _states(self, shape: LinearShape, layout: Layout) -> int:
        links = chain(layout, self.total)
        if layout.cp == 1 or len(links) == 1:
            return 0
        wide = accumulator_dtype(self.dtype).itemsize
        sizes = {"transition_bytes": shape.transition_size * wide, "state_bytes": shape.state_size * wide}

        def sent(rank: int) -> int:
            passes = (self.passing.sent(way, rank, **sizes) for way in (links, links.reversed()))
            return sum(each.bytes for each in passes)

        return _most(sent, layout.cp)

    def _halo(self, shape: LinearShape, layout: Layout) -> int:
        if not shape.taps or layout.cp == 1:
            return 0
        row = shape.channels * self.dtype.itemsize

        def sent(rank: int) -> int:
            reach = shape.taps - 1
            passes = halo_sent(layout, rank=rank, total=self.total, reach=reach, row_bytes=row)
            return sum(each.bytes for each in passes)

        return _most(sent, layout.cp)


def choose_state_layout(shape: StackShape, name: str | None) -> Layout:
    """Return where linear layers run.

    Args:
        name: as configured; None = where less is sent: as the softmax layers, or contiguous through relayouts. Stripes
            of less than `LEAST_STRIPE` tokens are never kept, since each would have a state of its own.
    """
    own = shape.softmax_layout
    if own.cp == 1 or name == "same":
        return own
    if name is not None:
        return Layout(name, own.cp)  # type: ignore[arg-type]
    contiguous = Layout("contiguous", own.cp)
    if own.name != "striped":
        return own
    if own.width < LEAST_STRIPE or not shape.layers.softmax:
        return contiguous
    return min(own, contiguous, key=lambda layout: shape.traffic(layout).total)


def _most(count: Callable[[int], int], ranks: int) -> int:
    looked_at: Sequence[int] = range(ranks) if ranks <= MANY_RANKS else (0, ranks // 2, ranks - 1)
    return max(map(count, looked_at))
