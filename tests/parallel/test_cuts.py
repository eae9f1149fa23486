"""Cuts: documents of every token, of the token before each run, and of halos."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longctx.parallel.cuts import cuts, extended_documents, extended_positions
from longctx.parallel.layout import Layout

CPU = torch.device("cpu")


def test_literally():
    layout = Layout("zigzag", 2)  # 0 1 2 | 3 4 5 + 6 7 | 8 9
    bounds = [(0, 2, 8, 10), (0, 9, 10)]
    made = cuts(layout, rank=0, total=10, bounds=bounds, device=CPU)
    assert made.lengths == (3, 2)
    assert made.documents.dtype == made.before.dtype == torch.int32
    assert made.documents.tolist() == [[0, 0, 1, 2, 2], [0, 0, 0, 0, 1]]
    assert made.before.tolist() == [[0, 1], [0, 0]]
    other = cuts(layout, rank=1, total=10, bounds=bounds[:1], device=CPU)
    assert (other.lengths, other.documents.tolist(), other.before.tolist()) == ((5,), [[1] * 5], [[1]])
    halos = extended_documents(layout, rank=0, total=10, bounds=bounds, reach=2, device=CPU)
    assert halos.dtype == torch.int32
    assert halos.tolist() == [[-1, -1, 0, 0, 1, 1, 1, 2, 2], [-1, -1, 0, 0, 0, 0, 0, 0, 1]]


def test_one_document_needs_no_numbers():
    layout = Layout("contiguous", 2)
    for bounds in (None, [(0, 8)], [(0, 8), (0, 8)]):
        made = cuts(layout, rank=1, total=8, bounds=bounds, device=CPU)
        assert (made.lengths, made.documents, made.before) == ((4,), None, None)
        assert extended_documents(layout, rank=1, total=8, bounds=bounds, reach=3, device=CPU) is None


@pytest.mark.parametrize("bounds", [[(0, 4)], [(0, 9)], [(1, 8)], [(0, 4, 4, 8)], [(0, 8), (0, 5)], []])
def test_bounds_must_fit(bounds):
    with pytest.raises(ValueError, match="cu_seqlens"):
        cuts(Layout("contiguous", 2), rank=0, total=8, bounds=bounds, device=CPU)


@given(
    cp=st.integers(1, 5),
    tokens=st.integers(1, 7),
    reach=st.integers(0, 4),
    name=st.sampled_from(("contiguous", "zigzag", "striped")),
    width=st.integers(1, 3),
    data=st.data(),
)
def test_every_token_has_its_document(cp, tokens, reach, name, width, data):
    layout = Layout(name, cp, width=width if name == "striped" else 1)
    total = cp * tokens
    inner = data.draw(st.sets(st.integers(1, total - 1))) if total > 1 else set()
    bounds = (0, *sorted(inner), total)
    document = [sum(p >= b for b in bounds[1:]) for p in range(total)]
    for rank in range(cp):
        made = cuts(layout, rank=rank, total=total, bounds=[bounds], device=CPU)
        assert made.tokens == tokens
        places = extended_positions(layout, rank=rank, total=total, reach=reach).tolist()
        halos = extended_documents(layout, rank=rank, total=total, bounds=[bounds], reach=reach, device=CPU)
        if len(bounds) == 2:
            assert made.documents is made.before is halos is None
            continue
        positions = layout.positions(rank, total).tolist()
        assert made.documents.tolist() == [[document[p] for p in positions]]
        starts = [positions[index] for index in made.bounds[:-1]]
        assert made.before.tolist() == [[document[max(p - 1, 0)] for p in starts]]
        assert halos.tolist() == [[document[p] if p >= 0 else -1 for p in places]]
