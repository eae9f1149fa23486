"""What a layer of attention sends, counted from the plan's integers before anything runs."""

import dataclasses

from longctx.parallel.heads import HeadSplit
from longctx.parallel.plan import Plan
from longctx.parallel.schedule import Sent, Shape


def traffic(plan: Plan, shape: Shape, *, batch: int = 1) -> tuple[Sent, Sent]:
    """Return what the plan's rank sends in the forward and the backward pass of one layer, to the byte.

    That of `with_lse` is not counted: teams send lse back to its tokens too.

    Args:
        shape: the heads of the whole layer.
        batch: rows of the micro-batch.
    """
    teams = plan.teams
    team, member = teams.place(plan.rank)
    split = HeadSplit(shape.heads, shape.kv_heads, teams.size)
    own = dataclasses.replace(shape, heads=len(split.q(0)), kv_heads=len(split.kv(0)))
    forward, backward = (
        Sent(sent.hops, {teams.members[peer][member]: count for peer, count in sent.bytes_to.items()})
        for sent in plan.schedule.sent(team, plan.needs, own)
    )
    if teams.size > 1:
        low, wide = shape.dtype.itemsize, shape.wide.itemsize
        q, out = own.heads * shape.head_dim, own.heads * shape.v_head_dim
        kv = own.kv_heads * (shape.head_dim + shape.v_head_dim)
        kv_grads = kv * (wide if split.repeats_kv else low)
        peers = [peer for peer in teams.members[team] if peer != plan.rank]
        there = (q + kv) * low + out * low
        back = out * low + own.heads * wide + q * low + kv_grads  # dout and delta; dq, dk and dv
        forward = _plus(forward, Sent(2, dict.fromkeys(peers, plan.tokens * there)))
        backward = _plus(backward, Sent(2, dict.fromkeys(peers, plan.tokens * back)))
    return _times(forward, batch), _times(backward, batch)


def _plus(a: Sent, b: Sent) -> Sent:
    peers = sorted({*a.bytes_to, *b.bytes_to})
    return Sent(a.hops + b.hops, {peer: a.bytes_to.get(peer, 0) + b.bytes_to.get(peer, 0) for peer in peers})


def _times(sent: Sent, rows: int) -> Sent:
    return Sent(sent.hops, {peer: rows * count for peer, count in sent.bytes_to.items()})


def in_bytes(count: float) -> str:
    """Return a number of bytes in words: `1.2 MB`, `3.4 kB`."""
    return f"{count / 1e6:,.1f} MB" if count >= 1e5 else f"{count / 1e3:,.1f} kB"
