"""The same inputs give bitwise the same outputs and gradients, time after time, however ranks race."""

import pytest
import torch

from longctx.kernels.mask import causal, documents
from longctx.parallel.layout import Layout
from longctx.parallel.loopback import run_ranks
from longctx.parallel.transport import ProcessGroupTransport
from tests.support.attention import SCHEDULES, make_heads, make_problem, make_schedule, sharded

MANY = pytest.param(50, marks=pytest.mark.slow)


def once(transport, schedule: str, dtype=torch.float32):
    cp = transport.size
    problem = make_problem(cp * 9, make_heads("gqa", cp), batch=2).to(dtype)
    masks = [causal(), causal() & documents((0, 5, cp * 9))]
    way = make_schedule(schedule, cp)
    return sharded(transport, Layout("striped", cp), problem, masks, schedule=way, kernel="torch", scores="sink")


def same(runs) -> bool:
    return all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("times", [5, MANY])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_simulated_ranks(schedule, dtype, times):
    for runs in run_ranks(4, lambda transport: [once(transport, schedule, dtype) for _ in range(times)]):
        assert same(runs)


def on_gloo(rank: int, world_size: int, group, times):
    transport = ProcessGroupTransport(group)
    return {schedule: same([once(transport, schedule) for _ in range(times)]) for schedule in SCHEDULES}


@pytest.mark.parametrize("times", [20, MANY])
def test_real_ranks(gloo_pool, times):
    for results in gloo_pool.run(on_gloo, 2, times):
        assert results == dict.fromkeys(SCHEDULES, True)
