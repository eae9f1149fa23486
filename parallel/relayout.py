"""Relayout: from one token layout to another, one all-to-all of hidden states.

Softmax attention wants its layouts balanced, linear attention wants long runs. A stack that changes between layers pays
a relayout there and one on the way back; one that does not change pays nothing.
"""

from functools import lru_cache

import torch
from torch import Tensor

from longctx.parallel.layout import Layout
from longctx.parallel.routes import Routes, fetch, make_routes
from longctx.parallel.schedule import Sent
from longctx.parallel.transport import Transport

_CPU = torch.device("cpu")


def relayout(x: Tensor, *, source: Layout, target: Layout, total: int, transport: Transport) -> Tensor:
    """Return this rank's tokens in another layout; differentiable, the gradient takes the way back.

    All ranks call it together, forward and backward. No value is changed, in any dtype. Where this rank holds the same
    tokens before and after, in the same order, `x` itself is returned.

    Args:
        x: `[B, T, ...]` in `source`'s order.
        total: tokens of the whole sequence.

    Returns:
        `[B, T, ...]` in `target`'s order.
    """
    assert source.cp == target.cp == transport.size, (source, target, transport.size)
    routes = _routes(source, target, transport.rank, total, x.device)
    return x if routes.identity else fetch(x, routes=routes, transport=transport)


def relayout_sent(source: Layout, target: Layout, *, rank: int, total: int, row_bytes: int) -> Sent:
    """Return what a rank sends in the forward pass; in the backward pass it is that of `target` to `source`.

    Args:
        row_bytes: of one position's hidden states, with all rows of the batch.
    """
    return _routes(source, target, rank, total, _CPU).sent(row_bytes)


@lru_cache(maxsize=16)  # on the device: at most 32 bytes per token
def _routes(source: Layout, target: Layout, rank: int, total: int, device: torch.device) -> Routes:
    wanted = [target.positions(peer, total) for peer in range(target.cp)]
    return make_routes(source, wanted, rank=rank, total=total, device=device)
