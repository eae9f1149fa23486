"""Circuits: every shard passes everyone who wants it, sums come home complete, nothing else is sent."""

from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.kernels.mask import causal, documents
from longctx.parallel import circuit
from longctx.parallel.circulate import circulate
from longctx.parallel.layout import Layout
from longctx.parallel.loopback import run_ranks
from longctx.parallel.needs import needs_of
from longctx.parallel.teams import single_ranks

TOKENS = 5
SIZES = [(1, 1), (2, 1), (2, 2), (3, 3), (4, 2), (4, 1), (6, 2), (6, 3), (6, 6), (8, 2), (9, 3)]


@pytest.mark.parametrize(("size", "inner"), SIZES)
def test_every_rank_holds_every_shard_once_its_own_first(size, inner):
    orders = [circuit.order(rank, size, inner) for rank in range(size)]
    for rank, order in enumerate(orders):
        assert order[0] == rank and sorted(order) == list(range(size))
    for time in range(size):
        assert sorted(order[time] for order in orders) == list(range(size))


@st.composite
def tables(draw):
    """Return (size, inner, wanted): any spans, own shards included, some wanted by nobody."""
    size, inner = draw(st.sampled_from(SIZES))
    edge = st.integers(0, TOKENS)
    span = st.one_of(st.none(), st.tuples(edge, edge).filter(lambda s: s[0] < s[1]))
    return size, inner, tuple(tuple(draw(span) for _ in range(size)) for _ in range(size))


def poisoned(*args, **kwargs) -> torch.Tensor:
    return torch.full(*args, float("nan"), **kwargs)


@pytest.mark.parametrize("examples", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_shards_reach_who_wants_them_and_sums_come_home(examples):
    """Buffers hold NaN until their exchange was waited for, so what is used or sent on too early shows."""

    @settings(deadline=None, max_examples=examples)
    @given(tables())
    def check(case):
        check_circuit(*case)

    with patch("longctx.parallel.circulate.torch.empty", poisoned):
        check()


def test_a_shard_that_came_with_a_later_one_has_arrived_before_it_goes_on():
    """On three inner rings one exchange may be about shards that are due at different times."""
    layout = Layout("zigzag", 6)
    mask = causal() & documents((0, 13, 21, 64, 72))
    needs = needs_of(layout, [mask], single_ranks(6), total=72)
    with patch("longctx.parallel.circulate.torch.empty", poisoned):
        check_circuit(6, 2, needs.keys, tokens=12)


def check_circuit(size, inner, wanted, *, tokens=TOKENS):

    def rank(transport):
        shard = torch.arange(tokens * 1.0)[None, :, None] + 100 * transport.rank
        visits = []

        def visit(source, tensors):
            visits.append((source, tensors[0].clone()))
            return (tensors[0] * (1 + transport.rank),)

        (sums,) = circulate(transport, wanted, (shard,), inner=inner, visit=visit, like=(shard[:, :0],))
        return visits, sums, transport.traffic

    results = run_ranks(size, rank)
    for here, (visits, _, traffic) in enumerate(results):
        seen = [source for source in circuit.order(here, size, inner) if wanted[here][source] is not None]
        assert [source for source, _ in visits] == seen
        for source, part in visits:
            begin, end = wanted[here][source]
            assert part.flatten().tolist() == [100.0 * source + token for token in range(begin, end)]
        hops, bytes_to = circuit.sent(here, wanted, inner, payload=4, sums=4)
        assert (traffic.hops, traffic.bytes_to) == (hops, bytes_to)
    for owner, (_, sums, _) in enumerate(results):
        expected = torch.zeros(tokens)
        for other in range(size):
            if wanted[other][owner] is not None:
                begin, end = wanted[other][owner]
                expected[begin:end] += (torch.arange(begin, end) + 100.0 * owner) * (1 + other)
        assert torch.equal(sums.flatten(), expected)


def test_nothing_wanted_of_others_is_nothing_sent():
    wanted = tuple(tuple((0, 3) if a == b else None for b in range(4)) for a in range(4))
    for rank in range(4):
        assert circuit.sent(rank, wanted, 2, payload=1, sums=1) == (0, {})


def test_a_shard_is_carried_no_further_than_its_last_user_and_only_what_is_still_wanted():
    """Rank 0's shard is wanted by 1 (all of it) and 2 (its last two tokens): 0 -> 1 -> 2, then its sums 1 -> 2 -> 0."""
    wanted = (
        ((0, 5), None, None, None),
        ((0, 5), (0, 5), None, None),
        ((3, 5), None, (0, 5), None),
        (None, None, None, (0, 5)),
    )
    assert circuit.sent(0, wanted, 4, payload=10, sums=1) == (2, {1: 50})  # and the sums that arrive
    assert circuit.sent(1, wanted, 4, payload=10, sums=1)[1] == {2: 20 + 5}
    assert circuit.sent(2, wanted, 4, payload=10, sums=1)[1] == {0: 5}
    assert circuit.sent(3, wanted, 4, payload=10, sums=1) == (0, {})
