"""The pool of gloo ranks: results, errors, deaths, hangs, and the restart after each."""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from tests.support.distributed import GlooPool, RankError


def total(rank, world_size, group, scale):
    x = torch.full((2,), float((rank + 1) * scale))
    dist.all_reduce(x, group=group)
    return x


def identity(rank, world_size, group):
    assert dist.get_rank(group) == rank
    assert dist.get_world_size(group) == dist.get_world_size() == world_size
    return os.getpid()


def mesh(rank, world_size, group):
    axes = init_device_mesh("cpu", (world_size // 2, 2), mesh_dim_names=("dp", "cp"))
    return [axes["dp"].get_local_rank(), axes["cp"].get_local_rank()]


def draw(rank, world_size, group):
    sample = torch.rand(3)
    torch.set_default_dtype(torch.float64)
    return sample


def fail(rank, world_size, group, failing):
    if rank in failing:
        raise ValueError(f"data.seq_len is 7 on rank {rank}")
    dist.barrier(group=group)


def leave(rank, world_size, group):
    raise SystemExit(3)


def die(rank, world_size, group):
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier(group=group)


def hang(rank, world_size, group):
    if rank == 0:
        time.sleep(600)


def unpicklable(rank, world_size, group):
    return lambda: None


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_results_come_in_the_order_of_ranks(gloo_pool, world_size):
    results = gloo_pool.run(total, world_size, 10)
    assert [x.tolist() for x in results] == [[5.0 * world_size * (world_size + 1)] * 2] * world_size


def test_processes_are_reused_and_have_the_default_group(gloo_pool):
    first = gloo_pool.run(identity, 2)
    assert len(set(first)) == 2
    assert gloo_pool.run(identity, 2) == first


def test_device_mesh_over_the_default_group(gloo_pool):
    assert gloo_pool.run(mesh, 4) == [[0, 0], [0, 1], [1, 0], [1, 1]]


def test_every_task_starts_from_the_same_state(gloo_pool):
    first, second = gloo_pool.run(draw, 2), gloo_pool.run(draw, 2)
    assert all(x.dtype == torch.float32 and torch.equal(x, first[0]) for x in [*first, *second])


@pytest.mark.parametrize("failing", [[1], [0, 1]], ids=["rank1", "all"])
def test_an_exception_comes_back_with_rank_and_traceback(gloo_pool, failing):
    with pytest.raises(RankError, match=r"rank 1: ValueError: data.seq_len is 7 on rank 1\nTraceback") as caught:
        gloo_pool.run(fail, 2, failing)
    failures = caught.value.failures
    assert [rank for rank in failures if failures[rank].kind == "ValueError"] == failing
    assert set(failures) == {0, 1}  # a rank that waits for the failed one is not left behind
    assert gloo_pool.run(total, 2, 1)[0].tolist() == [3.0, 3.0]


def test_system_exit_is_a_failure(gloo_pool):
    with pytest.raises(RankError, match="rank 0: SystemExit: 3"):
        gloo_pool.run(leave, 1)


def test_a_dead_rank_is_named_and_the_world_restarted(gloo_pool):
    before = gloo_pool.run(identity, 2)
    with pytest.raises(RankError, match="rank 1: died: killed by SIGKILL"):
        gloo_pool.run(die, 2)
    after = gloo_pool.run(identity, 2)
    assert not set(before) & set(after)


def test_a_rank_that_died_between_tasks_is_named():
    with GlooPool() as pool:
        os.kill(pool.run(identity, 2)[1], signal.SIGKILL)
        with pytest.raises(RankError, match="rank 1: died: killed by SIGKILL"):
            pool.run(total, 2, 1)
        assert pool.run(total, 2, 1)[1].tolist() == [3.0, 3.0]


def test_a_hung_rank_is_stopped_and_shows_where_it_was(gloo_pool):
    begin = time.monotonic()
    with pytest.raises(RankError, match="rank 0: no answer: stopped after") as caught:
        gloo_pool.run(hang, 2, timeout=1.0)
    assert time.monotonic() - begin < 30
    assert set(caught.value.failures) == {0}
    assert "in hang" in caught.value.failures[0].details
    assert gloo_pool.run(total, 2, 1)[0].tolist() == [3.0, 3.0]


def test_a_result_that_cannot_be_pickled_is_a_failure(gloo_pool):
    with pytest.raises(RankError, match=r"rank 0: .*pickle"):
        gloo_pool.run(unpicklable, 1)


def test_functions_and_world_sizes_that_cannot_work(gloo_pool):
    with pytest.raises(ValueError, match="module level"):
        gloo_pool.run(lambda rank, world_size, group: rank, 2)
    with pytest.raises(ValueError, match="world_size is 5; the pool has 1 to 4"):
        gloo_pool.run(total, 5, 1)


def test_leaving_the_pool_ends_its_processes():
    with GlooPool() as pool:
        (pid,) = pool.run(identity, 1)
        folder = pool.worlds[1].folder.name
        os.kill(pid, 0)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert not os.path.exists(folder)  # noqa: PTH110
