"""The chain: every segment once, in the order of the sequence."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longctx.kernels.positions import Segment
from longctx.parallel.chain import Chain, chain, runs
from longctx.parallel.layout import Layout

layouts = st.one_of(
    st.builds(Layout, st.sampled_from(("contiguous", "zigzag")), st.integers(1, 8)),
    st.builds(Layout, st.just("striped"), st.integers(1, 8), st.integers(1, 5)),
)


def test_literally():
    assert chain(Layout("contiguous", 3), 9).links == ((0, 0), (1, 0), (2, 0))
    assert chain(Layout("zigzag", 3), 15).links == ((0, 0), (1, 0), (2, 0), (1, 1), (0, 1))
    assert chain(Layout("zigzag", 3), 3).links == ((0, 0), (1, 0), (2, 0))
    assert chain(Layout("striped", 2), 4).links == ((0, 0), (1, 0), (0, 1), (1, 1))
    assert chain(Layout("striped", 2, width=3), 10).links == ((0, 0), (1, 0), (0, 1), (1, 1))
    assert chain(Layout("striped", 1, width=2), 5).links == ((0, 0),)
    assert runs(Layout("zigzag", 3), 1, 15) == (Segment(3, 1, 3), Segment(11, 1, 2))
    assert runs(Layout("zigzag", 3), 2, 15) == (Segment(6, 1, 5),)  # the last rank's two chunks follow each other
    assert runs(Layout("striped", 2), 1, 6) == (Segment(1, 1, 1), Segment(3, 1, 1), Segment(5, 1, 1))
    assert runs(Layout("striped", 2, width=3), 1, 10) == (Segment(3, 1, 3), Segment(8, 1, 2))


@given(layout=layouts, tokens=st.integers(1, 13))
def test_links_are_the_whole_sequence_in_order(layout, tokens):
    total = layout.cp * tokens
    links = chain(layout, total)
    walked = [runs(layout, rank, total)[segment] for rank, segment in links.links]
    assert [p for run in walked for p in range(run.start, run.last + 1)] == list(range(total))
    assert all(run.stride == 1 for run in walked)
    for rank in range(layout.cp):
        own = runs(layout, rank, total)
        assert [p for run in own for p in range(run.start, run.last + 1)] == layout.positions(rank, total).tolist()
        assert [links.links[place] for place in links.places(rank)] == [(rank, index) for index in range(len(own))]
    owners = [links.owner(place) for place in range(len(links))]
    assert all(a != b for a, b in pairwise(owners))  # runs are as long as can be


@given(layout=layouts, tokens=st.integers(1, 9))
def test_reversed(layout, tokens):
    links = chain(layout, layout.cp * tokens)
    back = links.reversed()
    assert back.reversed() == links
    for rank in links.ranks:
        assert back.places(rank) == tuple(len(links) - 1 - place for place in links.places(rank))
        assert back.walk(rank) == tuple((len(links) - 1 - p, s) for p, s in reversed(links.walk(rank)))


@pytest.mark.parametrize("links", [((0, 1),), ((0, 0), (0, 0)), ((0, 0), (1, 1))])
def test_local_indices_are_counted_from_0(links):
    with pytest.raises(AssertionError):
        Chain(links)
