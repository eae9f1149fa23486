"""Halos against slices of the whole sequence: values, gradients of every rank, bytes; any layout, any reach."""

import pytest
import torch

from longctx.parallel.halo import extend, halo_sent
from longctx.parallel.layout import Layout
from longctx.parallel.loopback import run_ranks
from longctx.parallel.transport import ProcessGroupTransport, Transport

LAYOUTS = {"contiguous": 1, "zigzag": 1, "striped1": 1, "striped2": 2, "striped3": 3}
BATCH, CHANNELS = 2, 3


def make_layout(name: str, cp: int) -> Layout:
    return Layout(name.rstrip("0123456789"), cp, width=LAYOUTS[name])


def windows(layout: Layout, rank: int, total: int, reach: int) -> list[int]:
    """Return the positions of a rank's runs with `reach` before each, one by one."""
    found: list[int] = []
    previous = None
    for position in layout.positions(rank, total).tolist():
        if previous is None or position != previous + 1:
            found += range(position - reach, position)
        found.append(position)
        previous = position
    return found


def whole(total: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(BATCH, total, CHANNELS, generator=generator, dtype=torch.float64).to(dtype)


def extended(transport: Transport, layout: Layout, total: int, reach: int) -> list:
    """Return this rank's extended tokens, the gradient of its own ones, and its traffic, forward and in all."""
    x = layout.shard(whole(total), rank=transport.rank, dim=1).requires_grad_()
    out = extend(x, layout=layout, total=total, transport=transport, reach=reach)
    forward = transport.traffic.hops, dict(transport.traffic.bytes_to)
    generator = torch.Generator().manual_seed(transport.rank)
    (dx,) = torch.autograd.grad(out, x, torch.randn(out.shape, generator=generator, dtype=out.dtype))
    back = {peer: count - forward[1].get(peer, 0) for peer, count in transport.traffic.bytes_to.items()}
    return [out.detach(), dx, forward, (transport.traffic.hops - forward[0], back)]


def check(ranks: list[list], layout: Layout, total: int, reach: int) -> None:
    x = whole(total)
    gradient = torch.zeros_like(x)
    for rank, (out, _, forward, backward) in enumerate(ranks):
        positions = windows(layout, rank, total, reach)
        douts = torch.randn(out.shape, generator=torch.Generator().manual_seed(rank), dtype=out.dtype)
        assert out.shape == (BATCH, len(positions), CHANNELS)
        for index, position in enumerate(positions):
            assert torch.equal(out[:, index], x[:, position] if position >= 0 else torch.zeros_like(x[:, 0]))
            if position >= 0:
                gradient[:, position] += douts[:, index]
        expected = halo_sent(layout, rank=rank, total=total, reach=reach, row_bytes=8 * BATCH * CHANNELS)
        for (hops, bytes_to), sent in zip((forward, backward), expected, strict=True):
            assert hops == sent.hops
            assert {peer: count for peer, count in bytes_to.items() if count} == sent.bytes_to
    for rank, (_, dx, _, _) in enumerate(ranks):
        assert (dx - layout.shard(gradient, rank=rank, dim=1)).abs().max() < 1e-14, rank


@pytest.fixture
def poisoned(monkeypatch):
    """Fill fresh memory with NaN: whoever reads what did not arrive is found out."""
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: new_empty(*a, **k).fill_(float("nan")))


@pytest.mark.parametrize("reach", [0, 1, 3, 6])
@pytest.mark.parametrize("tokens", [1, 2, 5, 9])
@pytest.mark.parametrize("cp", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.usefixtures("poisoned")
def test_equal_to_slices(name, cp, tokens, reach):
    layout = make_layout(name, cp)
    total = cp * tokens
    check(run_ranks(cp, lambda transport: extended(transport, layout, total, reach)), layout, total, reach)


def on_gloo(rank: int, world_size: int, group):
    return [
        extended(ProcessGroupTransport(group), make_layout(name, world_size), world_size * 3, 4) for name in LAYOUTS
    ]


@pytest.mark.parametrize("size", [2, 4])
def test_process_group(gloo_pool, size):
    ranks = gloo_pool.run(on_gloo, size)
    for case, name in enumerate(LAYOUTS):
        check([rank[case] for rank in ranks], make_layout(name, size), size * 3, 4)


def test_bytes():
    def sent(layout, rank, total, reach):
        return [
            (each.hops, each.bytes_to) for each in halo_sent(layout, rank=rank, total=total, reach=reach, row_bytes=10)
        ]

    contiguous = Layout("contiguous", 3)
    for total in (30, 3000):
        assert sent(contiguous, 0, total, 3) == [(1, {1: 30}), (1, {})]
        assert sent(contiguous, 1, total, 3) == [(1, {2: 30}), (1, {0: 30})]
        assert sent(contiguous, 2, total, 3) == [(1, {}), (1, {1: 30})]
        assert sent(Layout("zigzag", 3), 2, total, 3) == [(1, {1: 30}), (1, {1: 30})]
    assert sent(contiguous, 0, 6, 3) == [(1, {1: 20, 2: 10}), (1, {})]  # halos longer than shards
    # 0 2 4 6 | 1 3 5 7: every token but the last of rank 1 is before one of the other rank's, and travels once.
    assert sent(Layout("striped", 2), 0, 8, 3) == [(1, {1: 40}), (1, {1: 30})]


def test_sums_of_low_precision_are_wide():
    """One token before many others: gradients are added in float32 and rounded once."""
    layout, total = Layout("striped", 1 + 1), 4

    def run(transport):
        x = layout.shard(whole(total, torch.bfloat16), rank=transport.rank, dim=1).requires_grad_()
        out = extend(x, layout=layout, total=total, transport=transport, reach=3)
        dout = torch.full_like(out, 2.0**-8)
        dout[:, 3::4] = 1.0  # each run's own token, last of its four
        return torch.autograd.grad(out, x, dout)[0]

    first, _ = run_ranks(2, run)
    # Position 0 is in front of 2 (own rank) and of 1 and 3 (the other one): 1 + 3/256 is 1 + 2/128 in bfloat16, whose
    # steps are 1/128 here. Added one by one, each 1/256 would be lost.
    assert torch.equal(first[:, 0], torch.full_like(first[:, 0], 1 + 2 / 128))
