"""Teams: who shares heads with whom, and in which order a team holds its tokens."""

from itertools import pairwise

import pytest
import torch

from longctx.parallel.layout import Layout
from longctx.parallel.teams import neighbours, part_of, single_ranks, spread, team_order, team_shard

LAYOUTS = [("contiguous", 1), ("zigzag", 1), ("striped", 1), ("striped", 3)]


def test_arrangements():
    assert neighbours(6, 2).members == ((0, 1), (2, 3), (4, 5))
    assert spread(6, 2).members == ((0, 3), (1, 4), (2, 5))
    assert single_ranks(3).members == ((0,), (1,), (2,))
    assert spread(6, 2).place(4) == (1, 1) and spread(6, 2).counterparts(4) == (3, 4, 5)
    assert neighbours(6, 2).counterparts(3) == (1, 3, 5)


@pytest.mark.parametrize("tokens", [1, 2, 7, 8])
@pytest.mark.parametrize("teams", [neighbours(4, 4), neighbours(4, 2), spread(4, 2), single_ranks(4)])
@pytest.mark.parametrize(("name", "width"), LAYOUTS)
def test_the_order_takes_the_members_shards_to_the_strips(name, width, teams, tokens):
    layout, total = Layout(name, 4, width), 4 * tokens
    for members in teams.members:
        shards = torch.cat([layout.positions(rank, total) for rank in members])
        order = team_order(layout, members, total, torch.device("cpu"))
        strips = team_shard(layout, members, total)
        positions = [torch.arange(s.start, s.last + 1, s.stride) for strip in strips for s in strip]
        assert torch.equal(torch.cat(positions), shards if order is None else shards[order.there])
        assert order is None or torch.equal(order.there[order.back], torch.arange(len(shards)))
        for strip in strips:
            assert all(a.last < b.start for a, b in pairwise(strip))


@pytest.mark.parametrize(("name", "width"), LAYOUTS)
def test_a_team_of_all_ranks_has_the_whole_sequence_in_order(name, width):
    ((segment,),) = team_shard(Layout(name, 4, width), (0, 1, 2, 3), 4 * 6)
    assert (segment.start, segment.stride, segment.count) == (0, 1, 24)


def test_spread_teams_of_a_striped_layout_are_stripes_again():
    ((segment,),) = team_shard(Layout("striped", 8), (1, 5), 8 * 6)
    assert (segment.start, segment.stride, segment.count) == (1, 4, 12)
    assert len(team_shard(Layout("striped", 8), (0, 1), 8 * 6)) == 2  # neighbours are not: a strip each


def test_part_of_a_strip():
    strip = Layout("zigzag", 2).segments(0, 16)
    assert [(s.start, s.count) for s in part_of(strip, 2, 6)] == [(2, 2), (12, 2)]
    assert part_of(strip, 8, 9) == ()
