"""Counts against counting."""

import pytest

from longctx.kernels.block_sparse.patterns.counts import last, triangle
from longctx.kernels.block_sparse.routing.pair_counts import routed_pairs


@pytest.mark.parametrize("begin", [0, 3, 4, 9])
@pytest.mark.parametrize("length", [1, 2, 5, 23])
@pytest.mark.parametrize("others", [0, 1, 2, 99])
def test_routed_pairs(begin, length, others):
    want = 0
    for t in range(begin, begin + length):
        before = t // 4 - begin // 4
        want += t - max(begin, t // 4 * 4) + 1 + min(others, before) * 4
    assert routed_pairs(begin, length, block_size=4, others=others) == want


@pytest.mark.parametrize("length", [1, 2, 5, 23])
def test_window_and_triangle(length):
    assert triangle(length) == sum(range(1, length + 1))
    for window in (1, 3, 5, 50):
        assert last(length, window) == sum(min(i, window) for i in range(1, length + 1))
