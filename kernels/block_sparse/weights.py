"""What a tile of queries makes of its tile of keys: scores to weights, and the gradients of scores. Three kinds.

Shapes: scores and their like `[N, rows, width]`, what is per row `[N, rows, 1]`. Hidden scores are -inf.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from longctx.kernels.contract import Scores


class RowTerms(NamedTuple):
    """What backward knows of each row: lse and delta of all hops, and with gates that of its slot."""

    lse: Tensor
    delta: Tensor
    gate: Tensor | None


def scores_of(q: Tensor, k: Tensor, scores: Scores) -> Tensor:
    """Return `s = scale q.k`, capped: q `[N, rows, D]`, k `[N, width, D]`."""
    s = torch.bmm(q * scores.softmax_scale, k.transpose(1, 2))
    return s if scores.softcap is None else torch.tanh_(s.div_(scores.softcap)).mul_(scores.softcap)


def softmax_forward(s: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return out `[N, rows, Dv]` and lse `[N, rows, 1]` of the tile alone; s is overwritten. Rows see something."""
    top = s.amax(-1, keepdim=True)
    p = s.sub_(top).exp_()
    total = p.sum(-1, keepdim=True)
    return torch.bmm(p, v).div_(total), top + total.log()


def softmax_backward(s: Tensor, v: Tensor, dout: Tensor, rows: RowTerms) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the weights, d(scores), and d(gates) if there are gates, with the lse of all hops; s is overwritten.

    With gates the tile is a slot: weights are `g p`, p its own softmax and `g = exp(gate - lse)`. Then
    `ds = g p (dp - slot)` with `slot = rowsum(p dp)`, and `dgate = g (slot - delta)`.
    """
    dp = torch.bmm(dout, v.transpose(1, 2))
    if rows.gate is None:
        p = s.sub_(rows.lse).exp_()
        return p, dp.sub_(rows.delta).mul_(p), None
    p = torch.softmax(s, dim=-1)
    share = (rows.gate - rows.lse).exp()
    slot = (p * dp).sum(-1, keepdim=True)
    p *= share
    return p, dp.sub_(slot).mul_(p), share * (slot - rows.delta)


def slope_of(s: Tensor, scores: Scores) -> Tensor | None:
    """Return the derivative of the cap at capped scores, `1 - (s / c)^2`; None without one."""
    return None if scores.softcap is None else 1 - (s / scores.softcap) ** 2
