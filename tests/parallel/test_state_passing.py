"""State passing against a plain fold over the chain: states, gradients rank by rank, hops and bytes, every method."""

from functools import lru_cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.kernels.linear.affine import Affine
from longctx.parallel.chain import Chain, chain
from longctx.parallel.layout import Layout
from longctx.parallel.loopback import run_ranks
from longctx.parallel.state_passing import PASSINGS, StatePassing, pass_states, resolve_passing
from longctx.parallel.transport import ProcessGroupTransport, Transport

LAYOUTS = {"contiguous": 1, "zigzag": 1, "striped1": 1, "striped3": 3, "striped16": 16}
BATCH, HEADS, KEYS, VALUES = 2, 2, 3, 5
TRANSITIONS = {"scalar": (1, 1), "diagonal": (KEYS, 1), "dense": (KEYS, KEYS)}


def make_layout(name: str, cp: int) -> Layout:
    return Layout(name.rstrip("0123456789"), cp, width=LAYOUTS[name])


def total_of(layout: Layout) -> int:
    """Return an odd number of tokens per rank, few of them where each is a link."""
    return layout.cp * (5 if layout.name != "striped" or layout.width == 1 else 2 * layout.width + 1)


@lru_cache
def problem(links: int, shape: str, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return transitions, states and gradients of all links, `[B, links, H, ...]`; every third transition is 0."""
    generator = torch.Generator().manual_seed(seed)
    factors = torch.rand(BATCH, links, HEADS, *TRANSITIONS[shape], generator=generator, dtype=torch.float64)
    if shape == "dense":
        factors = torch.randn(factors.shape, generator=generator, dtype=torch.float64) / KEYS**0.5
    factors[:, 2::3] = 0
    states = torch.randn(2, BATCH, links, HEADS, KEYS, VALUES, generator=generator, dtype=torch.float64)
    return factors, states[0], states[1]


@lru_cache
def folded(links: int, shape: str, seed: int = 0) -> list[torch.Tensor]:
    """Return what enters every link, and the gradients of transitions and states, one link after the other."""
    transition, state, dout = problem(links, shape, seed)
    transition, state = transition.clone().requires_grad_(), state.clone().requires_grad_()
    entering = [0 * state[:, 0]]  # part of the graph, for a chain of one link
    for place in range(links - 1):
        entering.append(Affine(transition[:, place], state[:, place])(entering[-1]))
    states = torch.stack(entering, dim=1)
    grads = torch.autograd.grad(states, (transition, state), dout, allow_unused=True, materialize_grads=True)
    return [states.detach(), *grads]


def passed(transport: Transport, links: Chain, shape: str, passing: StatePassing, seed: int = 0) -> list:
    """Return this rank's states and gradients, and what it sent forward and backward."""
    places = list(links.places(transport.rank))
    transition, state, dout = (x[:, places] for x in problem(len(links), shape, seed))
    transition, state = transition.requires_grad_(), state.requires_grad_()
    states = pass_states(Affine(transition, state), passing=passing, chain=links, transport=transport)
    hops, sent = transport.traffic.hops, dict(transport.traffic.bytes_to)
    grads = torch.autograd.grad(states, (transition, state), dout)
    back = {peer: count - sent.get(peer, 0) for peer, count in transport.traffic.bytes_to.items()}
    return [states.detach(), *grads, (hops, sent), (transport.traffic.hops - hops, back)]


def check(ranks: list[list], links: Chain, shape: str, passing: StatePassing, seed: int = 0) -> None:
    want = folded(len(links), shape, seed)
    rows, columns = TRANSITIONS[shape]
    each = 8 * BATCH * HEADS
    for rank, (*tensors, forward, backward) in enumerate(ranks):
        for name, ours, ref in zip(("states", "dM", "dR"), tensors, want, strict=True):
            ref = ref[:, list(links.places(rank))]
            assert ours.shape == ref.shape
            assert (ours - ref).abs().max() < 1e-12, f"{name} of rank {rank}"
        for (hops, bytes_to), direction in ((forward, links), (backward, links.reversed())):
            sent = passing.sent(
                direction, rank, transition_bytes=each * rows * columns, state_bytes=each * KEYS * VALUES
            )
            assert hops == sent.hops
            assert {peer: count for peer, count in bytes_to.items() if count} == sent.bytes_to


@pytest.fixture
def poisoned(monkeypatch):
    """Fill fresh memory with NaN: whoever reads what did not arrive is found out."""
    for name in ("empty_like", "empty"):
        right = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, right=right, **k: right(*a, **k).fill_(float("nan")))
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: new_empty(*a, **k).fill_(float("nan")))


@pytest.mark.parametrize("shape", TRANSITIONS)
@pytest.mark.parametrize("cp", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("method", PASSINGS)
@pytest.mark.usefixtures("poisoned")
def test_equal_to_a_fold_on_every_rank(method, name, cp, shape):
    layout = make_layout(name, cp)
    links = chain(layout, total_of(layout))
    passing = resolve_passing(method)
    check(run_ranks(cp, lambda transport: passed(transport, links, shape, passing)), links, shape, passing)


@st.composite
def chains(draw) -> tuple[int, Chain]:
    """Draw links in any order, also several of a rank in a row."""
    size = draw(st.integers(1, 4))
    owners = draw(st.lists(st.integers(0, size - 1), min_size=size, max_size=9))
    owners += [rank for rank in range(size) if rank not in owners]
    counts = [0] * size
    links = []
    for rank in owners:
        links.append((rank, counts[rank]))
        counts[rank] += 1
    return size, Chain(tuple(links))


@settings(max_examples=60, deadline=None)
@given(drawn=chains(), shape=st.sampled_from(list(TRANSITIONS)), method=st.sampled_from(PASSINGS), data=st.data())
def test_any_chain(drawn, shape, method, data):
    size, links = drawn
    splits = data.draw(st.integers(1, VALUES)) if method == "pipelined" else None
    passing = resolve_passing(method, splits=splits)
    check(run_ranks(size, lambda transport: passed(transport, links, shape, passing)), links, shape, passing)


GLOO_CASES = [
    (method, name, shape)
    for method in PASSINGS
    for name, shape in (("contiguous", "diagonal"), ("zigzag", "dense"), ("striped3", "scalar"))
]


def on_gloo(rank: int, world_size: int, group):
    results = []
    for method, name, shape in GLOO_CASES:
        layout = make_layout(name, world_size)
        links = chain(layout, total_of(layout))
        results.append(passed(ProcessGroupTransport(group), links, shape, resolve_passing(method)))
    return results


@pytest.mark.parametrize("size", [2, 4])
def test_process_group(gloo_pool, size):
    ranks = gloo_pool.run(on_gloo, size)
    for case, (method, name, shape) in enumerate(GLOO_CASES):
        layout = make_layout(name, size)
        links = chain(layout, total_of(layout))
        check([rank[case] for rank in ranks], links, shape, resolve_passing(method))


M, S = 10, 1000  # bytes


@pytest.mark.parametrize(
    ("method", "splits", "forward"),
    [
        ("ring", None, [(1, {1: S}), (2, {2: S}), (2, {3: S}), (1, {})]),
        ("pipelined", 3, [(3, {1: S}), (4, {2: S}), (4, {3: S}), (3, {})]),
        ("all_gather", None, [(1, {1: S, 2: S, 3: S}), (1, {2: M + S, 3: M + S}), (1, {3: M + S}), (1, {})]),
        ("log_depth", None, [(2, {1: S, 2: S}), (2, {2: M + S, 3: S}), (2, {3: M + S}), (2, {})]),
    ],
)
def test_bytes_of_contiguous_shards(method, splits, forward):
    passing = resolve_passing(method, splits=splits)
    for total in (4, 4096):
        links = chain(Layout("contiguous", 4), total)
        for rank, (hops, bytes_to) in enumerate(forward):
            sent = passing.sent(links, rank, transition_bytes=M, state_bytes=S)
            back = passing.sent(links.reversed(), 3 - rank, transition_bytes=M, state_bytes=S)
            assert (sent.hops, sent.bytes_to) == (hops, bytes_to)
            assert (back.hops, back.bytes_to) == (hops, {3 - peer: count for peer, count in bytes_to.items()})


def test_bytes_of_zigzag_shards():
    for total in (16, 4096):
        links = chain(Layout("zigzag", 4), total)  # 0 1 2 3 2 1 0

        def sent(method, rank, links=links):
            each = resolve_passing(method).sent(links, rank, transition_bytes=M, state_bytes=S)
            return each.hops, each.bytes_to

        assert [sent("ring", rank) for rank in range(4)] == [
            (2, {1: S}),
            (4, {0: S, 2: S}),
            (4, {1: S, 3: S}),
            (2, {2: S}),
        ]
        assert sent("all_gather", 0) == (1, {1: S, 2: S, 3: S})
        assert sent("all_gather", 1) == (1, {0: 2 * (M + S), 2: M + S, 3: M + S})
        assert sent("log_depth", 0) == (3, {1: S, 2: 2 * S})  # link 0 to 1, 2 and 4; link 6 is the last one
        assert sent("log_depth", 3) == (2, {1: M + S, 2: M + S})  # link 3 to 4 and 5


@pytest.mark.parametrize("cp", [2, 4, 8])
@pytest.mark.parametrize("method", PASSINGS)
def test_error_in_float32_does_not_grow_with_the_ranks(method, cp):
    """Eight maps, on one rank or on many: against float64, no error is more than 10% larger."""

    def error(size: int, passing: StatePassing) -> float:
        links = Chain(tuple((place * size // 8, place % (8 // size)) for place in range(8)))

        def run(transport):
            maps = Affine(*(x[:, list(links.places(transport.rank))].float() for x in inputs))
            return pass_states(maps, passing=passing, chain=links, transport=transport)

        states = torch.cat(run_ranks(size, run), dim=1)
        return (states.double() - want).pow(2).mean().sqrt().item()

    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(4, 8, 4, 32, 32, generator=generator, dtype=torch.float64)
    inputs = [torch.linalg.qr(mixed)[0].float().double(), torch.randn(4, 8, 4, 32, 32, generator=generator).double()]
    entering = [torch.zeros_like(inputs[1][:, 0])]
    for place in range(7):
        entering.append(inputs[0][:, place] @ entering[-1] + inputs[1][:, place])
    want = torch.stack(entering, dim=1)
    assert error(cp, resolve_passing(method)) <= 1.1 * error(1, resolve_passing("ring"))


def test_options_are_not_ignored():
    assert resolve_passing("pipelined", splits=2).splits == 2
    with pytest.raises(ValueError, match="attention.state_passing=lasp is not known; known are ring, all_gather"):
        resolve_passing("lasp")
    with pytest.raises(ValueError, match="attention.state_splits=2 is an option of attention.state_passing=pipelined"):
        resolve_passing("ring", splits=2)
    with pytest.raises(ValueError, match="attention.state_splits must be >= 1 or null; given 0"):
        resolve_passing("pipelined", splits=0)
    maps = Affine(torch.ones(1, 1, 1, 1, 1), torch.ones(1, 1, 1, 2, 3))
    with pytest.raises(ValueError, match="attention.state_splits=4 must be at most V = 3"):
        run_ranks(
            1, lambda t: pass_states(maps, passing=resolve_passing("pipelined"), chain=Chain(((0, 0),)), transport=t)
        )
