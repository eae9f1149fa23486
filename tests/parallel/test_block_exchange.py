"""The exchange of selected blocks holds two parts of others at a time, however many ranks there are."""

import weakref

import pytest
import torch

from longctx.parallel.demand import Demand, shards_of
from longctx.parallel.layout import Layout
from longctx.parallel.loopback import run_ranks
from longctx.parallel.schedule import Shape
from longctx.parallel.schedules import block_exchange
from longctx.parallel.teams import neighbours

CP, TOTAL, BLOCK = 5, 80, 4
SHAPE = Shape(heads=2, kv_heads=1, head_dim=8, v_head_dim=8, dtype=torch.float64)


def demand_of(wanted):
    layout = Layout("contiguous", CP)
    return Demand(shards_of(layout, neighbours(CP, 1), total=TOTAL, block_size=BLOCK), wanted)


@pytest.mark.parametrize("some", [False, True])
def test_parts_and_gradients_go_where_they_belong(some):
    generator = torch.Generator().manual_seed(3)
    wanted = torch.ones(CP, TOTAL // BLOCK, dtype=torch.bool)
    if some:
        wanted = torch.rand(wanted.shape, generator=generator) < 0.3
        wanted[2] = False  # a rank that needs nothing still gives
        wanted[:, :4] = False  # and one that is asked for nothing still takes
    demand = demand_of(wanted)
    k, v = torch.randn(2, 1, TOTAL, 1, 8, generator=generator, dtype=torch.float64)
    layout = Layout("contiguous", CP)

    def on_rank(transport):
        own = [layout.shard(x, rank=transport.rank, dim=1) for x in (k, v)]
        live, most, seen = weakref.WeakSet(), [0], []

        def attend(source, heads, k_part, v_part):
            assert heads == (0, 1)
            positions = layout.positions(source, TOTAL)[demand.tokens(transport.rank, source)]
            assert torch.equal(k_part, k[:, positions]) and torch.equal(v_part, v[:, positions])
            live.add(k_part)
            most[0] = max(most[0], len(live))
            seen.append(source)
            return (transport.rank + 1.0) * torch.ones_like(k_part), 2 * v_part

        block_exchange.forward(transport, demand, *own, attend=attend)
        forward = transport.traffic.hops, transport.traffic.bytes
        dk, dv = block_exchange.backward(transport, demand, *own, attend=attend)
        needed = [rank for rank in range(CP) if len(demand.tokens(transport.rank, rank))]
        assert sorted(seen) == sorted(needed * 2)
        sent = demand.sent(transport.rank, SHAPE)
        assert forward == (sent[0].hops, sent[0].bytes)
        assert (transport.traffic.hops, transport.traffic.bytes) == (
            sent[0].hops + sent[1].hops,
            sent[0].bytes + sent[1].bytes,
        )
        return dk, dv, most[0], sum(each.bytes for each in sent)

    ranks = run_ranks(CP, on_rank)
    times = wanted.repeat_interleave(BLOCK, dim=1).to(torch.float64)  # [CP, TOTAL]
    shares = (times * torch.arange(1, CP + 1)[:, None]).sum(0)[None, :, None, None].expand_as(k)
    count = times.sum(0)[None, :, None, None]
    for rank, (dk, dv, most, _) in enumerate(ranks):
        at = layout.positions(rank, TOTAL)
        torch.testing.assert_close(dk, shares[:, at], rtol=0, atol=1e-12)
        torch.testing.assert_close(dv, (2 * count * v)[:, at], rtol=0, atol=1e-12)
        assert most <= 2, "parts of other ranks are kept"
    assert demand.sent_by_all(SHAPE) == sum(sent for *_, sent in ranks)
