"""Both transports: messages arrive in order and unchanged, and are counted; the overlap is real."""

import time

import pytest
import torch

from longctx.parallel.loopback import run_ranks
from longctx.parallel.ranks import Ranks
from longctx.parallel.transport import ProcessGroupTransport, Transport


def exchange(transport: Transport) -> list:
    mine = torch.full((3, 2), float(transport.rank), dtype=torch.bfloat16)
    twice = torch.arange(6.0).view(2, 3).t() + transport.rank  # not contiguous
    first, second = transport.shift((mine, twice)), transport.shift((mine + 10,))
    return [*first.wait(), *second.wait(), transport.traffic.hops, transport.traffic.bytes]


def check(results: list[list]) -> None:
    size = len(results)
    for rank, (mine, twice, third, hops, sent) in enumerate(results):
        source = (rank - 1) % size
        assert torch.equal(mine, torch.full((3, 2), float(source), dtype=torch.bfloat16))
        assert torch.equal(twice, torch.arange(6.0).view(2, 3).t() + source)
        assert torch.equal(third, torch.full((3, 2), source + 10.0, dtype=torch.bfloat16))
        assert hops == 2 and sent == 12 + 24 + 12


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_loopback(size):
    check(run_ranks(size, exchange))


def on_gloo(rank: int, world_size: int, group):
    return exchange(ProcessGroupTransport(group))


@pytest.mark.parametrize("size", [2, 4])
def test_process_group(gloo_pool, size):
    check(gloo_pool.run(on_gloo, size))


def test_loopback_copies_what_it_sends():
    def overwrite(transport):
        x = torch.ones(2)
        arriving = transport.shift((x,))
        x.zero_()
        return arriving.wait()[0]

    assert all(torch.equal(x, torch.ones(2)) for x in run_ranks(2, overwrite))


def test_a_failing_simulated_rank_is_reported_and_the_others_stop():
    def fail(transport):
        if transport.rank == 1:
            raise KeyError("rank 1 broke")
        transport.shift((torch.ones(1),)).wait()
        transport.shift((torch.ones(1),)).wait()

    with pytest.raises(KeyError, match="rank 1 broke"):
        run_ranks(3, fail)


def test_a_message_that_nobody_receives_is_an_error():
    with pytest.raises(AssertionError, match="never received"):
        run_ranks(2, lambda transport: transport.shift((torch.ones(1),)) and None)


def transfer_while_asleep(rank: int, world_size: int, group):
    """Return seconds to post and to wait for a transfer during which this rank sleeps."""
    transport = ProcessGroupTransport(group)
    x = torch.ones(4 << 20)
    transport.shift((x,)).wait()
    started = time.perf_counter()
    arriving = transport.shift((x,))
    posted = time.perf_counter() - started
    time.sleep(0.5)
    started = time.perf_counter()
    arriving.wait()
    return posted, time.perf_counter() - started


def test_a_transfer_goes_on_while_the_rank_does_something_else(gloo_pool):
    # 16 MiB take about 10 ms here; a transfer that only started in wait() could not end within a tenth of the sleep
    # on any machine that moves less than 320 MB/s, and posting must not block for the transfer.
    for posted, waited in gloo_pool.run(transfer_while_asleep, 2):
        assert posted < 0.25 and waited < 0.05


def agree(rank: int, world_size: int, group):
    with Ranks() as ranks:
        assert ranks.from_first(lambda: {"from": rank}) == {"from": 0}
        assert ranks.gather(rank) == list(range(world_size))
        messages = []
        for call in (
            lambda: ranks.from_first(lambda: int("x")),
            lambda: ranks.all_succeed(lambda: int("1" if rank == 0 else "y")),
            lambda: ranks.check_equal(str(rank), what="the configuration"),
        ):
            try:
                call()
            except ValueError as error:
                messages.append(str(error))
        ranks.check_equal("same", what="the configuration")
    return messages


def test_ranks_agree_on_values_and_errors(gloo_pool):
    for rank, (first, second, third) in enumerate(gloo_pool.run(agree, 2)):
        assert "invalid literal" in first and "'x'" in first
        assert "'y'" in second and second.startswith("rank 1: ") == (rank == 0)
        assert "on rank(s) [1] differs from rank 0's" in third
