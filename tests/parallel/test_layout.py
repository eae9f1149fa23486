"""Layouts by literal values, and the laws of sharding."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longctx.parallel.layout import Layout

NAMES = [("contiguous", 1), ("zigzag", 1), ("striped", 1), ("striped", 2), ("striped", 3)]


def owned(name: str, cp: int, total: int, width: int = 1) -> list[list[int]]:
    layout = Layout(name, cp, width)
    return [layout.positions(rank, total).tolist() for rank in range(cp)]


def test_contiguous():
    assert owned("contiguous", 3, 6) == [[0, 1], [2, 3], [4, 5]]


def test_zigzag():
    assert owned("zigzag", 2, 8) == [[0, 1, 6, 7], [2, 3, 4, 5]]
    assert owned("zigzag", 4, 8) == [[0, 7], [1, 6], [2, 5], [3, 4]]


def test_zigzag_with_an_odd_shard_has_a_longer_head():
    assert owned("zigzag", 2, 6) == [[0, 1, 5], [2, 3, 4]]
    assert owned("zigzag", 3, 3) == [[0], [1], [2]]


def test_striped():
    assert owned("striped", 3, 9) == [[0, 3, 6], [1, 4, 7], [2, 5, 8]]


def test_wide_stripes_end_in_a_narrower_round():
    assert owned("striped", 2, 8, width=2) == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert owned("striped", 2, 10, width=2) == [[0, 1, 4, 5, 8], [2, 3, 6, 7, 9]]
    assert owned("striped", 2, 4, width=5) == [[0, 1], [2, 3]]


@given(st.sampled_from(NAMES), st.integers(1, 9), st.integers(1, 12))
def test_every_position_has_one_owner_and_shards_are_ascending(named, cp, n):
    name, width = named
    ranks = owned(name, cp, cp * n, width)
    assert sorted(p for positions in ranks for p in positions) == list(range(cp * n))
    assert all(len(positions) == n and positions == sorted(positions) for positions in ranks)


@given(st.sampled_from(NAMES), st.integers(1, 6), st.integers(1, 8))
def test_unshard_undoes_shard(named, cp, n):
    layout = Layout(named[0], cp, named[1])
    x = torch.arange(2 * cp * n * 3).view(2, cp * n, 3)
    shards = [layout.shard(x, rank=rank, dim=1) for rank in range(cp)]
    assert torch.equal(layout.unshard(shards, dim=1), x)


def test_bad_layouts_are_refused():
    with pytest.raises(ValueError, match="attention.layout=spiral is not known; known are contiguous, zigzag, striped"):
        Layout("spiral", 2)
    with pytest.raises(ValueError, match="attention.width=4 needs attention.layout=striped; given zigzag"):
        Layout("zigzag", 2, 4)
    with pytest.raises(ValueError, match="attention.width must be >= 1; given 0"):
        Layout("striped", 2, 0)
    with pytest.raises(ValueError, match=r"data.seq_len=10 cannot be divided by parallel.cp=4 .* such as 8 or 12"):
        Layout("striped", 4).check_total(10)
    with pytest.raises(ValueError, match="such as 4 or 8"):
        Layout("striped", 4).check_total(3)
