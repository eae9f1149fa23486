"""Halos: the few tokens before each run of a rank, for a short causal convolution over the sequence.

Under any layout: they may lie on several ranks where runs are shorter than the halo. A token that several runs of a
rank need travels once.
"""

from functools import lru_cache

import torch
from torch import Tensor

from longctx.parallel.cuts import extended_positions
from longctx.parallel.layout import Layout
from longctx.parallel.routes import Routes, fetch, make_routes
from longctx.parallel.schedule import Sent
from longctx.parallel.transport import Transport

_CPU = torch.device("cpu")


def extend(x: Tensor, *, layout: Layout, total: int, transport: Transport, reach: int) -> Tensor:
    """Put the `reach` tokens before it in front of every run of consecutive positions of this rank; differentiable.

    All ranks call it together, forward and backward: gradients of halos go back to the tokens' owners, which add them.

    Args:
        x: `[B, T, ...]`, this rank's tokens.
        total: tokens of the whole sequence.
        reach: tokens before each run, the convolution's width less 1.

    Returns:
        `[B, E, ...]`, E = T + reach times the number of runs; zeros before position 0.
    """
    assert layout.cp == transport.size, (layout, transport.size)
    if reach == 0:
        return x
    routes = _routes(layout, transport.rank, total, reach, x.device)
    return fetch(x, routes=routes, transport=transport)


def halo_sent(layout: Layout, *, rank: int, total: int, reach: int, row_bytes: int) -> tuple[Sent, Sent]:
    """Return what a rank sends in the forward and in the backward pass.

    Args:
        row_bytes: of one position's channels, with all rows of the batch.
    """
    routes = _routes(layout, rank, total, reach, _CPU)
    return routes.sent(row_bytes), routes.sent_back(row_bytes)


@lru_cache(maxsize=16)  # on the device: at most 32 bytes per token of the output
def _routes(layout: Layout, rank: int, total: int, reach: int, device: torch.device) -> Routes:
    wanted = [extended_positions(layout, rank=peer, total=total, reach=reach) for peer in range(layout.cp)]
    return make_routes(layout, wanted, rank=rank, total=total, device=device)
