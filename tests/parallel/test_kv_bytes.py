"""What all teams send together is the sum of what each of them sends."""

import random

import pytest
import torch

from longctx.parallel.needs import Needs
from longctx.parallel.schedule import Shape
from longctx.parallel.schedules.all_gather import AllGather
from longctx.parallel.schedules.ring import DoubleRing, Ring

SHAPE = Shape(heads=8, kv_heads=2, head_dim=16, v_head_dim=24, dtype=torch.bfloat16)
SCHEDULES = [
    Ring(backward_moves="rotate_kv"),
    DoubleRing(ranks_per_ring=2, backward_moves="rotate_kv"),
    DoubleRing(ranks_per_ring=3, backward_moves="rotate_kv"),
    AllGather(gather_heads=2),
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_all_is_the_sum_of_each(schedule, density):
    draw = random.Random(density)

    def span():
        begin = draw.randrange(20)
        return (begin, draw.randrange(begin + 1, 21)) if draw.random() < density else None

    keys = tuple(tuple(span() for _ in range(6)) for _ in range(6))
    needs = Needs(keys, queries=())
    each = [sum(sent.bytes for sent in schedule.sent(team, needs, SHAPE)) for team in range(6)]
    assert schedule.kv_bytes(needs, SHAPE) == sum(each)
    assert (sum(each) > 0) == (density > 0)


def test_of_queries_that_would_travel_nothing_is_counted():
    """Where heads are few enough for `auto` to send queries round, what is selected still moves as K/V."""
    few = Shape(heads=4, kv_heads=4, head_dim=16, v_head_dim=16, dtype=torch.bfloat16)
    needs = Needs(tuple(((0, 8),) * 4 for _ in range(4)), queries=())
    assert Ring().moves_queries(few)
    assert Ring().kv_bytes(needs, few) == Ring(backward_moves="rotate_kv").kv_bytes(needs, few) > 0
