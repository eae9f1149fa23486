"""Tokens by position: any rank gets any tokens of a layout, in one exchange; backward brings their gradients home.

What `halo.py` and `relayout.py` have in common. Routes are integers, made once per layout and length.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longctx.kernels.merge import accumulator_dtype
from longctx.parallel.layout import Layout
from longctx.parallel.schedule import Sent
from longctx.parallel.transport import Transport

Tokens = slice | Tensor  # indices of a dim of tokens, int64 where they are no range
Turn = tuple[Tokens, Tokens]


@dataclass(frozen=True, eq=False)
class Routes:
    """What one rank gives, takes and makes of it.

    Attributes:
        count: tokens of the output.
        tokens: of this rank's shard.
        given: tokens of the shard that each peer needs, each once.
        taken: how many tokens come from each peer.
        turns: of each rank, this one included: where its tokens go in the output. A token that is needed more than once
            goes there in as many turns, so that sums of gradients have one order on every device.
        nothing: tokens of the output that are zeros.
    """

    count: int
    tokens: int
    given: dict[int, Tokens]
    taken: dict[int, int]
    turns: dict[int, tuple[Turn, ...]]
    nothing: Tokens | None

    @property
    def identity(self) -> bool:
        """Tell whether the output is the shard."""
        whole = slice(0, self.tokens)
        alone = not self.given and not self.taken and self.nothing is None
        return alone and list(self.turns.values()) == [((whole, whole),)]

    @property
    def adds(self) -> bool:
        """Tell whether some token of this rank or from a peer is needed more than once: its gradient is a sum."""
        uses = sum(_length(source) for turns in self.turns.values() for source, _ in turns)
        return uses + sum(map(_length, self.given.values())) > self.tokens + sum(self.taken.values())

    def sent(self, row_bytes: int) -> Sent:
        """Return what the rank sends in the forward pass, at `row_bytes` per token."""
        bytes_to = {peer: _length(tokens) * row_bytes for peer, tokens in self.given.items()}
        return Sent(int(bool(self.given or self.taken)), bytes_to)

    def sent_back(self, row_bytes: int) -> Sent:
        """Return what the rank sends in the backward pass: a gradient for every token that it took."""
        bytes_to = {peer: count * row_bytes for peer, count in self.taken.items()}
        return Sent(int(bool(self.given or self.taken)), bytes_to)


def make_routes(layout: Layout, wanted: Sequence[Tensor], *, rank: int, total: int, device: torch.device) -> Routes:
    """Return the routes of one rank.

    Args:
        layout: of the tokens that are there.
        wanted: for each rank the positions of its output, in order; negative ones are zeros.
        device: of the tokens.
    """
    owner, local = _owners(layout, total)
    given, taken, turns = {}, {}, {}
    mine = wanted[rank]
    for peer in range(layout.cp):
        where = torch.nonzero((mine >= 0) & (owner[mine.clamp(min=0)] == peer))[:, 0]
        if peer == rank:
            turns[peer] = _turns(local[mine[where]], where, device)
            continue
        theirs = wanted[peer]
        if len(needed := torch.unique(theirs[(theirs >= 0) & (owner[theirs.clamp(min=0)] == rank)])):
            given[peer] = _tokens(local[needed], device)
        if len(where):
            needed, index = torch.unique(mine[where], return_inverse=True)
            taken[peer] = len(needed)
            turns[peer] = _turns(index, where, device)
    nothing = torch.nonzero(mine < 0)[:, 0]
    return Routes(
        count=len(mine),
        tokens=total // layout.cp,
        given=given,
        taken=taken,
        turns={peer: each for peer, each in turns.items() if each},
        nothing=_tokens(nothing, device) if len(nothing) else None,
    )


def fetch(x: Tensor, *, routes: Routes, transport: Transport) -> Tensor:
    """Return the output of the routes, `[B, count, ...]`, of a shard `[B, T, ...]`; differentiable.

    All ranks call it together, forward and backward.
    """
    assert x.shape[1] == routes.tokens, (x.shape, routes.tokens)
    return _Fetch.apply(x, routes, transport)  # type: ignore[no-untyped-call,no-any-return]


class _Fetch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, routes: Routes, transport: Transport) -> Tensor:
        ctx.arguments = routes, transport
        parts = {peer: _buffer(x, count) for peer, count in routes.taken.items()}
        exchange = None
        if routes.given or parts:
            outgoing = {peer: [x[:, tokens].contiguous()] for peer, tokens in routes.given.items()}
            exchange = transport.exchange(outgoing, {peer: [part] for peer, part in parts.items()})
        out = _buffer(x, routes.count)
        if routes.nothing is not None:
            out[:, routes.nothing] = 0
        _spread(x, out, routes.turns.get(transport.rank, ()))
        if exchange is not None:
            exchange.wait()
        for peer, part in parts.items():
            _spread(part, out, routes.turns[peer])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None, None]:
        routes, transport = ctx.arguments
        wide = accumulator_dtype(dout.dtype) if routes.adds else dout.dtype
        parts = {peer: _gathered(dout, count, routes.turns[peer], wide) for peer, count in routes.taken.items()}
        arriving = {peer: _buffer(dout, _length(tokens)) for peer, tokens in routes.given.items()}
        exchange = None
        if parts or arriving:
            exchange = transport.exchange(
                {peer: [part.to(dout.dtype)] for peer, part in parts.items()},
                {peer: [part] for peer, part in arriving.items()},
            )
        dx = _gathered(dout, routes.tokens, routes.turns.get(transport.rank, ()), wide)
        if exchange is not None:
            exchange.wait()
        for peer, part in sorted(arriving.items()):
            dx[:, routes.given[peer]] += part
        return dx.to(dout.dtype), None, None


def _spread(part: Tensor, out: Tensor, turns: Sequence[Turn]) -> None:
    for source, target in turns:
        out[:, target] = part[:, source]


def _gathered(dout: Tensor, count: int, turns: Sequence[Turn], dtype: torch.dtype) -> Tensor:
    """Return the sums of gradients for the `count` tokens of a part."""
    total = dout.new_zeros((dout.shape[0], count, *dout.shape[2:]), dtype=dtype)
    for source, target in turns:
        total[:, source] += dout[:, target]
    return total


def _buffer(like: Tensor, count: int) -> Tensor:
    return like.new_empty((like.shape[0], count, *like.shape[2:]))


def _turns(source: Tensor, target: Tensor, device: torch.device) -> tuple[Turn, ...]:
    """Split pairs of indices into turns, in each of which no source comes twice."""
    order = torch.argsort(source, stable=True)
    ascending = source[order]
    number = torch.empty_like(source)  # how often the same source came before
    number[order] = torch.arange(len(source)) - torch.searchsorted(ascending, ascending)
    turns = []
    for turn in range(int(number.max()) + 1 if len(source) else 0):
        chosen = number == turn
        turns.append((_tokens(source[chosen], device), _tokens(target[chosen], device)))
    return tuple(turns)


def _tokens(indices: Tensor, device: torch.device) -> Tokens:
    """Return indices as a slice if they are a range."""
    first, count = int(indices[0]), len(indices)
    if torch.equal(indices, torch.arange(first, first + count)):
        return slice(first, first + count)
    return indices.to(device)


def _length(tokens: Tokens) -> int:
    return tokens.stop - tokens.start if isinstance(tokens, slice) else len(tokens)


@lru_cache(maxsize=2)  # 16 bytes per position, for the time of making routes
def _owners(layout: Layout, total: int) -> tuple[Tensor, Tensor]:
    """Return each position's rank and its local index there, int64 `[total]`."""
    owner, local = torch.empty(total, dtype=torch.int64), torch.empty(total, dtype=torch.int64)
    for rank in range(layout.cp):
        positions = layout.positions(rank, total)
        owner[positions], local[positions] = rank, torch.arange(len(positions))
    return owner, local
