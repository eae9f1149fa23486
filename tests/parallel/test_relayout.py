"""Relayout: tokens in another layout's order, gradients back, bytes; nothing moves between equal layouts."""

import itertools

import pytest
import torch

from longctx.parallel.layout import Layout
from longctx.parallel.loopback import run_ranks
from longctx.parallel.relayout import relayout, relayout_sent
from longctx.parallel.transport import ProcessGroupTransport, Transport

LAYOUTS = {"contiguous": 1, "zigzag": 1, "striped1": 1, "striped3": 3, "striped16": 16}
PAIRS = list(itertools.permutations(LAYOUTS, 2))
GLOO_PAIRS = [("contiguous", "striped1"), ("striped1", "contiguous"), ("zigzag", "contiguous"), ("zigzag", "striped3")]
BATCH, CHANNELS = 2, 3


def make_layout(name: str, cp: int) -> Layout:
    return Layout(name.rstrip("0123456789"), cp, width=LAYOUTS[name])


def whole(total: int) -> torch.Tensor:
    return torch.arange(BATCH * total * CHANNELS, dtype=torch.float64).view(BATCH, total, CHANNELS)


def moved(transport: Transport, source: Layout, target: Layout, total: int) -> list:
    """Return this rank's tokens in the target layout, a gradient that comes back, and its traffic both ways."""
    rank = transport.rank
    x = source.shard(whole(total), rank=rank, dim=1).requires_grad_()
    out = relayout(x, source=source, target=target, total=total, transport=transport)
    forward = transport.traffic.hops, dict(transport.traffic.bytes_to)
    (dx,) = torch.autograd.grad(out, x, target.shard(-whole(total), rank=rank, dim=1))
    back = {peer: count - forward[1].get(peer, 0) for peer, count in transport.traffic.bytes_to.items()}
    return [out.detach(), dx, forward, (transport.traffic.hops - forward[0], back)]


def check(ranks: list[list], source: Layout, target: Layout, total: int) -> None:
    for rank, (out, dx, forward, backward) in enumerate(ranks):
        assert torch.equal(out, target.shard(whole(total), rank=rank, dim=1))
        assert torch.equal(dx, source.shard(-whole(total), rank=rank, dim=1))
        for (hops, bytes_to), way in ((forward, (source, target)), (backward, (target, source))):
            sent = relayout_sent(*way, rank=rank, total=total, row_bytes=8 * BATCH * CHANNELS)
            assert hops == sent.hops
            assert {peer: count for peer, count in bytes_to.items() if count} == sent.bytes_to


@pytest.fixture
def poisoned(monkeypatch):
    """Fill fresh memory with NaN: whoever reads what did not arrive is found out."""
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: new_empty(*a, **k).fill_(float("nan")))


@pytest.mark.parametrize("tokens", [1, 7, 16])
@pytest.mark.parametrize("cp", [1, 2, 3, 4, 8])
@pytest.mark.parametrize(("source", "target"), PAIRS)
@pytest.mark.usefixtures("poisoned")
def test_there_and_the_gradient_back(source, target, cp, tokens):
    ways = make_layout(source, cp), make_layout(target, cp)
    check(run_ranks(cp, lambda transport: moved(transport, *ways, cp * tokens)), *ways, cp * tokens)


def on_gloo(rank: int, world_size: int, group):
    transport = ProcessGroupTransport(group)
    results = []
    for names in GLOO_PAIRS:
        transport.traffic.hops, transport.traffic.bytes_to = 0, {}
        results.append(moved(transport, *(make_layout(name, world_size) for name in names), world_size * 7))
    return results


@pytest.mark.parametrize("size", [2, 4])
def test_process_group(gloo_pool, size):
    ranks = gloo_pool.run(on_gloo, size)
    for case, names in enumerate(GLOO_PAIRS):
        check([rank[case] for rank in ranks], *(make_layout(name, size) for name in names), size * 7)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (Layout("zigzag", 4), Layout("zigzag", 4)),
        (Layout("contiguous", 4), Layout("striped", 4, width=6)),  # one stripe a rank
        (Layout("contiguous", 1), Layout("zigzag", 1)),
    ],
)
def test_nothing_moves_between_layouts_that_hold_the_same(source, target):
    def run(transport):
        x = torch.randn(1, 6, 2)
        assert relayout(x, source=source, target=target, total=6 * source.cp, transport=transport) is x
        return transport.traffic.hops

    assert run_ranks(source.cp, run) == [0] * source.cp
    assert relayout_sent(source, target, rank=0, total=6 * source.cp, row_bytes=1).bytes_to == {}


def test_bytes():
    # 0 1 2 3 | 4 5 6 7 to 0 1 + 6 7 | 2 3 4 5: half of each shard.
    sent = relayout_sent(Layout("contiguous", 2), Layout("zigzag", 2), rank=0, total=8, row_bytes=10)
    assert (sent.hops, sent.bytes_to) == (1, {1: 20})
    # All but 1 / cp of the tokens leave for other ranks.
    for rank in range(4):
        sent = relayout_sent(Layout("contiguous", 4), Layout("striped", 4), rank=rank, total=64, row_bytes=10)
        assert (sent.hops, sent.bytes_to) == (1, {peer: 40 for peer in range(4) if peer != rank})


def test_any_dtype_is_unchanged():
    source, target = Layout("zigzag", 3), Layout("striped", 3)

    def run(transport):
        x = source.shard(torch.arange(0, 15, dtype=torch.bfloat16)[None], rank=transport.rank, dim=1).requires_grad_()
        out = relayout(x, source=source, target=target, total=15, transport=transport)
        (dx,) = torch.autograd.grad(out, x, out.detach())
        assert out.dtype == dx.dtype == torch.bfloat16
        assert torch.equal(dx, x.detach())
        return out.detach()

    assert torch.equal(target.unshard(run_ranks(3, run), dim=1), torch.arange(0, 15, dtype=torch.bfloat16)[None])
