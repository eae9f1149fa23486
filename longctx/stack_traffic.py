"""Where linear layers run, and what a stack sends besides K/V: states, halos, relayouts. Integers only."""

from collections import Counter
from collections.abc import Sequence
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
    """Bytes that one rank sends for one sequence, forward and backward, besides K/V.

    Attributes:
        states: for the states that enter its segments and others'.
        halos: for short convolutions.
        moved: for relayouts of hidden states.
    """

    states: int
    halos: int
    moved: int

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

    def relayouts(self, states: Layout) -> Counter[tuple[Layout, Layout]]:
        """Count the changes of layout in a forward pass, where the linear layers run in `states`."""
        return Counter((a, b) for a, b in pairwise(self.layouts(states)) if a != b and a.cp > 1)

    def traffic(self, states: Layout, *, rank: int) -> StackTraffic:
        """Count what a rank sends where the linear layers run in `states`."""
        row = self.dim * self.dtype.itemsize

        def moved(source: Layout, target: Layout) -> int:
            return relayout_sent(source, target, rank=rank, total=self.total, row_bytes=row).bytes

        kinds = [(self.linear(kind), self.layers.kinds.count(kind)) for kind in self.layers.linear_kinds]
        return StackTraffic(
            states=sum(count * self._states(shape, states, rank) for shape, count in kinds),
            halos=sum(count * self._halo(shape, states, rank) for shape, count in kinds),
            moved=sum(n * (moved(a, b) + moved(b, a)) for (a, b), n in self.relayouts(states).items()),
        )

    def most(self, states: Layout) -> StackTraffic:
        """Return the traffic of the rank that sends most."""
        cp = states.cp
        looked_at: Sequence[int] = range(cp) if cp <= MANY_RANKS else (0, cp // 2, cp - 1)
        return max((self.traffic(states, rank=rank) for rank in looked_at), key=lambda sent: sent.total)

    def _states(self, shape: LinearShape, layout: Layout, rank: int) -> int:
        return self.passed(layout, rank=rank, transition_size=shape.transition_size, state_size=shape.state_size)

    def passed(self, layout: Layout, *, rank: int, transition_size: int, state_size: int) -> int:
        """Return the bytes that a rank sends to pass states of so many numbers, forward and backward."""
        links = chain(layout, self.total)
        if len(links) == 1:
            return 0
        wide = accumulator_dtype(self.dtype).itemsize
        sizes = {"transition_bytes": transition_size * wide, "state_bytes": state_size * wide}
        return sum(self.passing.sent(way, rank, **sizes).bytes for way in (links, links.reversed()))

    def _halo(self, shape: LinearShape, layout: Layout, rank: int) -> int:
        if not shape.taps:
            return 0
        row, reach = shape.channels * self.dtype.itemsize, shape.taps - 1
        return sum(sent.bytes for sent in halo_sent(layout, rank=rank, total=self.total, reach=reach, row_bytes=row))


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
    if own.width < LEAST_STRIPE or not (shape.layers.softmax or shape.layers.sparse):
        return contiguous
    return min(own, contiguous, key=lambda layout: shape.most(layout).total)
