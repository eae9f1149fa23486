"""Plans: work per hop against the closed formulas, every visible pair once, equal masks and layers share a plan."""

import pytest
import torch

from longctx.kernels.mask import HeadMasks, causal, documents, plain_masks
from longctx.kernels.tiles import visible
from longctx.parallel.layout import Layout
from longctx.parallel.plan import plan
from longctx.parallel.schedules.ring import Ring
from tests.support.attention import LAYOUTS, MASKS, SCHEDULES, make_mask, make_schedule

N = 64


def hop_pairs(name: str, cp: int) -> list[list[int]]:
    plans = [plan(Layout(name, cp), (causal(),), Ring(), rank=rank, total=cp * N) for rank in range(cp)]
    return [[hop.pairs for hop in each.hops] for each in plans]


@pytest.mark.parametrize("cp", [2, 3, 4, 8])
def test_contiguous_work_per_hop(cp):
    for rank, hops in enumerate(hop_pairs("contiguous", cp)):
        assert hops == [N * (N + 1) // 2] + [N * N if hop <= rank else 0 for hop in range(1, cp)]


@pytest.mark.parametrize("cp", [2, 3, 4, 8])
def test_striped_work_per_hop(cp):
    for rank, hops in enumerate(hop_pairs("striped", cp)):
        sources = Ring().order(rank, cp)
        assert hops == [N * (N + 1) // 2 if source <= rank else N * (N - 1) // 2 for source in sources]


@pytest.mark.parametrize("cp", [2, 3, 4, 8])
def test_zigzag_work_per_hop(cp):
    for hops in hop_pairs("zigzag", cp):
        assert hops == [N * (N + 1) // 2] + [N * N // 2] * (cp - 1)


def seen(each, layout: Layout, total: int, heads: int) -> torch.Tensor:
    """Return how often a plan's tiles count each pair `[heads of the rank, T, T]`, hop by hop and for queries too."""
    teams = each.teams
    team = teams.place(each.rank)[0]
    counts = []
    for queries_travel in (False, True):
        count = torch.zeros(heads, total, total, dtype=torch.int64)
        for hop in each.query_hops.values() if queries_travel else each.hops:
            own, other = (held(layout, teams.members[i], total) for i in (team, hop.source))
            moving = other[slice(*hop.needed)] if hop.needed else other[:0]
            q, k = (moving, own) if queries_travel else (own, moving)
            for part in hop.lists:
                for tile in part.tiles:
                    i, j = q[tile.rows], k[tile.columns]
                    own_heads = slice(None) if part.heads is None else slice(*part.heads)
                    count[own_heads, i[:, None], j[None, :]] += visible(tile, device="cpu").long()
        counts.append(count)
    return counts


def held(layout: Layout, members: tuple[int, ...], total: int) -> torch.Tensor:
    """Return the positions that a team holds, in its order, from its strips alone."""
    from longctx.parallel.teams import team_shard

    segments = [segment for strip in team_shard(layout, members, total) for segment in strip]
    return torch.cat([torch.arange(s.start, s.last + 1, s.stride) for s in segments])


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_visible_pair_is_computed_once_by_its_owner(schedule, mask):
    cp, total, heads = 4, 4 * 7, 4
    positions = torch.arange(total)
    for name, width in LAYOUTS.values():
        layout, way, chosen = Layout(name, cp, width), make_schedule(schedule, cp), make_mask(mask, total, heads=heads)
        allowed = torch.stack([each.allowed(positions, positions) for each in plain_masks(chosen)]).expand(
            heads, -1, -1
        )
        forward, backward = (torch.zeros(heads, total, total, dtype=torch.int64) for _ in range(2))
        for rank in range(cp):
            each = plan(layout, (chosen,), way, rank=rank, total=total)
            share = heads // each.teams.size
            member = each.teams.place(rank)[1]
            own = slice(member * share, (member + 1) * share)
            there, back = seen(each, layout, total, share)
            forward[own] += there
            backward[own] += back
        assert torch.equal(forward, allowed.long()), layout
        assert torch.equal(backward, allowed.long()), layout


def test_rows_with_equal_masks_share_a_plan():
    layout = Layout("striped", 2)
    same = plan(layout, (causal(), causal()), Ring(), rank=0, total=8)
    assert len(same.masks) == 1
    assert same is plan(layout, (causal(), causal()), Ring(), rank=0, total=8)
    assert len(plan(layout, (causal(), causal() & documents((0, 3, 8))), Ring(), rank=0, total=8).masks) == 2


def test_neighbouring_heads_with_equal_masks_share_tiles():
    heads = HeadMasks((causal(), causal(), causal() & documents((0, 3, 8)), causal()))
    (own, *_) = plan(Layout("striped", 2), (heads,), Ring(), rank=0, total=8).hops
    assert [each.heads for each in own.lists] == [(0, 2), (2, 3), (3, 4)]
