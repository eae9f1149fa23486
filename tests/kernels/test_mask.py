"""Masks against their definition, and the laws of `&`."""

import copy
import pickle
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longctx.kernels.mask import (
    HeadMasks,
    Mask,
    Part,
    causal,
    chunked,
    documents,
    full,
    per_head,
    predicate,
    prefix_lm,
    sliding_window,
)
from tests.kernels.mask_cases import Atom, atoms, conjunction, definition, even_sum, near_seven

TOTAL = 12
POSITIONS = torch.arange(TOTAL)
lots = st.lists(atoms(TOTAL), min_size=1, max_size=4)


def allowed(mask: Mask) -> torch.Tensor:
    return mask.allowed(POSITIONS, POSITIONS, total=TOTAL)


@given(lots)
def test_a_conjunction_is_its_definition_on_the_documents_of_the_whole(some):
    assert torch.equal(allowed(conjunction(some)), definition(some, TOTAL))


@given(lots, lots)
def test_and_lets_through_what_both_let_through(some, others):
    a, b = conjunction(some), conjunction(others)
    # An integer `first` means the documents of the whole: both have to know them.
    cuts = {0, TOTAL}.union(*(atom.bounds() for atom in some + others))
    whole = documents(sorted(cuts))
    assert torch.equal(allowed(a & b & whole), allowed(a & whole) & allowed(b & whole))
    assert (a & b & whole) == ((a & whole) & (b & whole))


@given(lots, lots, lots)
def test_and_is_associative_commutative_and_idempotent(some, others, rest):
    a, b, c = conjunction(some), conjunction(others), conjunction(rest)
    assert (a & b) & c == a & (b & c)
    assert a & b == b & a and hash(a & b) == hash(b & a)
    assert a & a == a
    assert a & full() == a


@given(lots)
def test_parts_are_disjoint_and_in_order(some):
    parts = conjunction(some).parts
    for before, after in pairwise(parts):
        assert before.most < after.least
    assert not any(part.empty for part in parts)


@given(st.lists(atoms(TOTAL), min_size=1, max_size=3))
def test_blocks_and_limits_hold_all_that_is_visible(some):
    mask = conjunction(some)
    bounds = mask.bounds(TOTAL)
    assert set(mask.document_bounds(TOTAL)) <= set(bounds)
    block = torch.bucketize(POSITIONS, torch.tensor(bounds[1:-1], dtype=torch.int64), right=True)
    assert not (allowed(mask) & (block[:, None] != block[None, :])).any()
    for part, limit in zip(mask.parts, mask.limits(TOTAL), strict=True):
        alone = Mask((part,), mask.cu_seqlens, mask.chunks)
        if limit is None:
            assert part.first is None
        else:
            assert not allowed(alone)[:, torch.tensor(limit)[block] <= POSITIONS].any()


def test_names():
    assert full() == Mask() == sliding_window(None, None)
    assert causal() == Mask((Part(most=0),)) == sliding_window(None) == sliding_window(None, sinks=4) == prefix_lm(0)
    assert causal() & sliding_window(3, 3) == sliding_window(3)
    assert documents((0, 4, 12)) & causal() == Mask((Part(most=0),), (0, 4, 12))
    assert sliding_window(3, sinks=2) == Mask((Part(most=-4, first=2), Part(-3, 0)))
    assert sliding_window(3, 1, sinks=2) == Mask((Part(most=-4, first=2), Part(-3, 1), Part(least=2, first=2)))
    assert prefix_lm(5) == Mask((Part(most=0), Part(least=1, first=5)))
    assert chunked(8) & chunked(4) == chunked(4) and chunked(4) & chunked(6) == Mask(chunks=(4, 6))
    assert sliding_window(5, sinks=2) & sliding_window(2, sinks=2) == sliding_window(2, sinks=2)
    assert sliding_window(3) & Mask((Part(most=-4),)) == Mask(()) and not allowed(Mask(())).any()
    assert not predicate(even_sum).banded and causal().banded


def test_an_integer_means_the_documents_of_the_whole_and_a_tuple_stays_where_it_was():
    packed = documents((0, 4, 6, 12))
    every = sliding_window(0, sinks=1) & packed
    assert allowed(every)[:, 4].tolist() == [False] * 4 + [True] * 2 + [False] * 6
    assert allowed(prefix_lm(2) & packed)[6, 7] and not allowed(prefix_lm(2) & packed)[6, 8]
    one = prefix_lm((5,), (0, 12)) & packed
    assert one.parts[1].first == (4, 1, 0)
    # A prefix of 10 of the whole and sinks of 3 of each document, whichever comes first.
    ahead = Mask((Part(first=(10,)),), (0, 12)) & Mask((Part(most=-1, first=3), Part(least=0)))
    assert ahead.parts == (Part(None, -1, (10,), 3), Part(0, None, (10,)))
    late = prefix_lm((10,), (0, 12)) & Mask((Part(most=0), Part(least=1, first=3)))
    assert late.parts[1] == Part(1, None, (10,), 3)
    assert (late & packed).parts[1] == Part(1, None, (4, 2, 4), 3)
    assert (late & packed).limits(12)[1] == (3, 6, 9)


def test_chunks_count_from_the_start_of_a_document():
    mask = documents((0, 5, 12)) & chunked(3)
    assert mask.bounds(12) == (0, 3, 5, 8, 11, 12)
    assert mask.document_bounds(12) == (0, 5, 12)
    assert mask.bounds(12) is mask.bounds(12)


def test_heads():
    heads = per_head([causal(), full()])
    assert heads == HeadMasks((causal(), full())) and heads.banded
    packed = documents((0, 4, 12))
    assert packed & heads == heads & packed == per_head([packed & causal(), packed])
    assert heads & per_head([sliding_window(2), sliding_window(3)]) == per_head([sliding_window(2), sliding_window(3)])
    assert not (heads & predicate(even_sum)).banded
    with pytest.raises(ValueError, match="masks of 2 heads with masks of 1 heads"):
        heads & per_head([full()])
    with pytest.raises(ValueError, match="one Mask for each query head"):
        per_head([])
    with pytest.raises(ValueError, match="one Mask for each query head"):
        per_head([heads])


def test_predicates_are_the_same_if_they_are_the_same_object():
    a, b = predicate(even_sum), predicate(near_seven)
    assert a & b == b & a and len((a & b & a).predicates) == 2
    assert predicate(lambda q, k: q >= k) != predicate(lambda q, k: q >= k)


@pytest.mark.parametrize("mask", [Atom("prefix_per_document", ((2, 3), (0, 4, 12))).mask() & chunked(3), full()])
def test_masks_can_be_copied_and_sent(mask):
    hash(mask), mask.bounds(12), mask.limits(12)
    for other in (copy.deepcopy(mask), pickle.loads(pickle.dumps(mask))):
        assert other == mask and hash(other) == hash(mask)
        assert "_hash" not in pickle.loads(pickle.dumps(mask)).__dict__


def test_the_kept_hash_does_not_travel_to_another_process():
    """Functions hash by address: a mask that brought its hash along would be lost in every cache."""
    mask = predicate(torch.eq)
    hash(mask)
    code = (
        "import pickle, sys, torch; from longctx.kernels.mask import predicate;"
        "assert pickle.loads(sys.stdin.buffer.read()) in {predicate(torch.eq)}"
    )
    subprocess.run([sys.executable, "-c", code], input=pickle.dumps(mask), check=True)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sliding_window(-1), "sliding_window left must be an integer >= 0; given -1"),
        (lambda: sliding_window(1, -2), "sliding_window right must be an integer >= 0; given -2"),
        (lambda: sliding_window(1, sinks=-3), "sliding_window sinks must be an integer >= 0; given -3"),
        (lambda: prefix_lm(-1), "prefix_lm prefix must be an integer >= 0; given -1"),
        (lambda: prefix_lm((1, 2)), "needs the documents: give cu_seqlens"),
        (lambda: prefix_lm((1, 2), (0, 12)), "need one prefix per document: 1; given 2"),
        (lambda: prefix_lm((1, 9), (0, 4, 12)), "prefix of document 1 must be 0 to its 8 tokens; given 9"),
        (lambda: prefix_lm((-1, 9), (0, 4, 12)), "must be an integer >= 0"),
        (lambda: chunked(0), "at least 1 token; given 0"),
        (lambda: documents((0, 5, 5, 12)), "strictly upwards"),
        (lambda: documents(()), "strictly upwards"),
        (lambda: documents((0, 12)) & documents((0, 9)), "documents of 12 tokens with documents of 9"),
        (lambda: documents((0, 12)).bounds(10), "from 0 to 10"),
        (lambda: documents((0, 12)).allowed(POSITIONS, POSITIONS, total=10), "from 0 to 10"),
        (lambda: Mask((Part(most=0), Part(least=0))), "parts of a mask must not overlap"),
        (lambda: Part(first=-1), "first tokens must be >= 0 or None; given -1"),
        (lambda: allowed(predicate(lambda q, k: q - k)), "must return a bool tensor.*int64"),
        (lambda: allowed(predicate(lambda q, k: True)), "must return a bool tensor.*returned bool"),
        (lambda: allowed(predicate(lambda q, k: q.expand(-1, 5) > 0)), r"broadcast to \[Tq, Tk\] = \(12, 12\)"),
    ],
)
def test_bad_masks_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_mask_of_many_documents_is_hashed_once():
    class Counted(int):
        hashed = 0

        def __hash__(self) -> int:
            Counted.hashed += 1
            return int.__hash__(self)

    mask = causal() & Mask(cu_seqlens=tuple(Counted(i) for i in range(1000)))
    for _ in range(5):
        hash(mask)
    assert Counted.hashed == 1000
