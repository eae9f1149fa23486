"""Both transports: messages arrive in order and unchanged, and are counted; the overlap is real."""

import time

import pytest
import torch

from longctx.parallel.loopback import run_ranks
from longctx.parallel.ranks import Ranks
from longctx.parallel.transport import Among, ProcessGroupTransport, Transport


def shift(transport: Transport, *tensors: torch.Tensor, lane: int = 0):
    """Post a hop to the next rank; return the exchange and what arrives from the one before."""
    after, before = (transport.rank + 1) % transport.size, (transport.rank - 1) % transport.size
    arriving = [torch.full_like(x, float("nan"), memory_format=torch.contiguous_format) for x in tensors]
    return transport.exchange({after: tensors}, {before: arriving}, lane=lane), arriving


def exchange(transport: Transport) -> list:
    mine = torch.full((3, 2), float(transport.rank), dtype=torch.bfloat16)
    twice = torch.arange(6.0).view(2, 3).t() + transport.rank  # not contiguous
    first, one = shift(transport, mine, twice)
    second, two = shift(transport, mine + 10)
    second.wait()  # the order of waiting is free
    first.wait()
    return [*one, *two, transport.traffic.hops, transport.traffic.bytes]


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


def uneven(transport: Transport) -> list:
    """Rank 0 gives each other rank as many numbers as its rank; lanes may be waited for in any order."""
    if transport.rank == 0:
        posted = [
            transport.exchange(
                {peer: [torch.full((peer,), float(lane))] for peer in range(1, transport.size)}, {}, lane=lane
            )
            for lane in (0, 1)
        ]
        for each in posted:
            each.wait()
        return [transport.traffic.hops, transport.traffic.bytes_to]
    buffers = [torch.empty(transport.rank) for _ in range(2)]
    posted = [transport.exchange({}, {0: [buffer]}, lane=lane) for lane, buffer in enumerate(buffers)]
    for each in reversed(posted):
        each.wait()
    return [*buffers, transport.traffic.hops, transport.traffic.bytes]


def check_uneven(results: list[list]) -> None:
    size = len(results)
    assert results[0] == [2, {peer: 2 * 4 * peer for peer in range(1, size)}]
    for rank, (near, far, hops, sent) in enumerate(results[1:], start=1):
        assert torch.equal(near, torch.zeros(rank)) and torch.equal(far, torch.ones(rank))
        assert hops == 2 and sent == 0


def uneven_on_gloo(rank: int, world_size: int, group):
    return uneven(ProcessGroupTransport(group))


def test_ranks_may_send_without_receiving_and_receive_without_sending(gloo_pool):
    check_uneven(run_ranks(4, uneven))
    check_uneven(gloo_pool.run(uneven_on_gloo, 4))


def test_a_part_of_a_group_is_a_group():
    def among(transport):
        odd = Among(transport, [3, 1]) if transport.rank % 2 else Among(transport, [0, 2])
        posted, (arrived,) = shift(odd, torch.tensor([float(transport.rank)]))
        posted.wait()
        return odd.rank, odd.size, arrived.item(), transport.traffic.bytes_to

    assert run_ranks(4, among) == [(0, 2, 2.0, {2: 4}), (1, 2, 3.0, {3: 4}), (1, 2, 0.0, {0: 4}), (0, 2, 1.0, {1: 4})]


def test_loopback_copies_what_it_sends():
    def overwrite(transport):
        x = torch.ones(2)
        posted, (arrived,) = shift(transport, x)
        x.zero_()
        posted.wait()
        return arrived

    assert all(torch.equal(x, torch.ones(2)) for x in run_ranks(2, overwrite))


def test_a_failing_simulated_rank_is_reported_and_the_others_stop():
    def fail(transport):
        if transport.rank == 1:
            raise KeyError("rank 1 broke")
        shift(transport, torch.ones(1))[0].wait()
        shift(transport, torch.ones(1))[0].wait()

    with pytest.raises(KeyError, match="rank 1 broke"):
        run_ranks(3, fail)


def test_a_message_that_nobody_receives_is_an_error():
    with pytest.raises(AssertionError, match="never received"):
        run_ranks(2, lambda transport: transport.exchange({1 - transport.rank: [torch.ones(1)]}, {}) and None)


def transfer_while_asleep(rank: int, world_size: int, group):
    """Return seconds to post and to wait for a transfer during which this rank sleeps."""
    transport = ProcessGroupTransport(group)
    x = torch.ones(4 << 20)
    shift(transport, x)[0].wait()
    started = time.perf_counter()
    arriving, _ = shift(transport, x)
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
