"""The hull of two shards holds all that is visible between them, and between single runs of tokens nothing more."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.kernels.mask import Mask, Part, causal, documents, full, predicate, prefix_lm, sliding_window
from longctx.kernels.positions import Segment, cut
from longctx.kernels.tiles import hull, tiles_between
from longctx.parallel.layout import Layout
from tests.kernels.mask_cases import atoms, conjunction, even_sum
from tests.kernels.test_tiles import LAYOUTS

N = 100
layouts = st.builds(
    lambda layout, cp: Layout(layout[0], cp, layout[1]), st.sampled_from(LAYOUTS), st.sampled_from([1, 2, 3, 4, 6])
)


def tight(seen: torch.Tensor) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """Return the ranges of rows and of columns with anything in them."""
    if not seen.any():
        return None
    rows, columns = seen.any(dim=1).nonzero().flatten(), seen.any(dim=0).nonzero().flatten()
    return (int(rows[0]), int(rows[-1]) + 1), (int(columns[0]), int(columns[-1]) + 1)


def positions(segment: Segment) -> torch.Tensor:
    return segment.start + segment.stride * torch.arange(segment.count)


@settings(deadline=None)
@given(st.data(), layouts)
def test_a_hull_holds_all_that_is_visible(data, layout):
    total = layout.cp * data.draw(st.integers(2, 25))
    mask = conjunction(data.draw(st.lists(atoms(total, predicates=False), min_size=1, max_size=3)))
    q_rank, k_rank = (data.draw(st.integers(0, layout.cp - 1)) for _ in range(2))
    q, k = (layout.segments(rank, total) for rank in (q_rank, k_rank))
    seen = mask.allowed(layout.positions(q_rank, total), layout.positions(k_rank, total))
    found = hull(q, k, mask=mask, total=total)
    if found is None:
        assert not seen.any()
        assert tiles_between(cut(q, mask.bounds(total)), cut(k, mask.bounds(total)), mask=mask, total=total) == ()
        return
    (q_begin, q_end), (k_begin, k_end) = found
    assert 0 <= q_begin < q_end <= seen.shape[0] and 0 <= k_begin < k_end <= seen.shape[1]
    seen[q_begin:q_end, k_begin:k_end] = False
    assert not seen.any()
    assert hull(q, k, mask=mask & predicate(even_sum), total=total) == found


@settings(deadline=None)
@given(st.data())
def test_a_hull_of_two_runs_of_tokens_is_exact(data):
    """For causal, window and document masks, between shards that are the same or do not overlap."""
    total = 40
    left, right = (data.draw(st.one_of(st.none(), st.integers(0, 20))) for _ in range(2))
    inner = data.draw(st.sets(st.integers(1, total - 1), max_size=5))
    mask = sliding_window(left, right) & documents((0, *sorted(inner), total))
    a, b, c, d = sorted(data.draw(st.lists(st.integers(0, total), min_size=4, max_size=4)))
    runs = [Segment(begin, 1, end - begin) for begin, end in ((a, b), (c, d)) if begin < end]
    for q in runs:
        for k in runs:
            want = tight(mask.allowed(positions(q), positions(k)))
            assert hull([q], [k], mask=mask, total=total) == want, (q, k)


def contiguous(q_rank: int, k_rank: int, mask: Mask):
    layout = Layout("contiguous", 8)
    return hull(layout.segments(q_rank, 8 * N), layout.segments(k_rank, 8 * N), mask=mask, total=8 * N)


@pytest.mark.parametrize("window", [1, 2, N - 1, N, N + 1, N + 2, 3 * N + 1, 3 * N + 2])
def test_a_window_needs_its_halo_from_the_neighbours_and_no_more(window):
    """Of W keys W - 1 are earlier ones: they are in the ceil((W - 1) / n) shards before."""
    mask = sliding_window(window - 1)
    needed = [contiguous(7, rank, mask) for rank in range(7)]
    assert sum(found is not None for found in needed) == -(-(window - 1) // N)
    assert sum(k_end - k_begin for found in needed if found for k_begin, k_end in found[1:]) == window - 1
    if window > 1:
        assert needed[6] == ((0, min(window - 1, N)), (max(N - window + 1, 0), N))


def test_documents_shorter_than_a_shard_need_nothing_but_what_is_cut():
    whole = documents(range(0, 8 * N + 1, N // 2)) & causal()
    assert all(contiguous(q, k, whole) is None for q in range(8) for k in range(8) if q != k)
    across = documents((0, 2 * N - 10, 2 * N + 30, 8 * N)) & causal()
    assert contiguous(2, 1, across) == ((0, 30), (N - 10, N))
    assert contiguous(3, 1, across) is None
    assert contiguous(1, 2, across) is None
    assert contiguous(1, 2, documents((0, 2 * N - 10, 2 * N + 30, 8 * N))) == ((N - 10, N), (0, 30))


def test_sinks_come_from_where_documents_begin_and_from_nowhere_between():
    mask = sliding_window(20, sinks=4)
    assert contiguous(6, 0, mask) == ((0, N), (0, 4))
    assert [contiguous(6, rank, mask) for rank in range(1, 5)] == [None] * 4
    assert contiguous(6, 5, mask) == ((0, 20), (N - 20, N))
    packed = mask & documents((0, 2 * N + 50, 8 * N))
    assert contiguous(6, 0, packed) is None
    assert contiguous(6, 2, packed) == ((0, N), (50, 54))
    assert contiguous(2, 0, packed) == ((0, 50), (0, 4))


def test_a_prefix_is_seen_from_before():
    assert contiguous(0, 2, prefix_lm(2 * N + 30)) == ((0, N), (0, 30))
    assert contiguous(0, 3, prefix_lm(2 * N + 30)) is None
    per_document = prefix_lm((10, N + 20), (0, N + 50, 8 * N))
    assert contiguous(1, 2, per_document) == ((50, N), (0, 70))
    assert contiguous(0, 1, per_document) is None


def test_the_first_tokens_of_each_document_are_looked_for_in_the_last_one_too():
    mask = Mask((Part(first=5),)) & documents((0, N // 2, 8 * N))
    assert contiguous(0, 0, mask) == ((0, N), (0, N // 2 + 5))


def test_nothing_is_seen_through_a_mask_without_parts():
    assert contiguous(0, 0, Mask(())) is None
    stripes = Layout("striped", 2, 1).segments(0, 64), Layout("striped", 2, 4).segments(0, 64)
    assert [hull(s, s, mask=Mask(()), total=64) for s in stripes] == [None, None]


def test_stripes_of_many_segments_are_compared_in_whole_stripes():
    layout = Layout("striped", 2, 4)
    q, k = layout.segments(0, 128), layout.segments(1, 128)
    assert len(q) * len(k) > 16
    assert hull(q, k, mask=full(), total=128) == ((0, 64), (0, 64))
    # The first stripe of the first rank is before all of the other's, whose last stripe is after all of its own.
    assert hull(q, k, mask=causal(), total=128) == ((4, 64), (0, 60))
    assert hull(k, q, mask=causal(), total=128) == ((0, 64), (0, 64))
    # Keys before position 10 are in one stripe of the other rank, 4 to 7, and only 0 to 3 see them ahead.
    ahead = Mask((Part(least=1, first=10),))
    assert hull(q, k, mask=ahead, total=128) == ((0, 4), (0, 4))
    assert hull(q, q, mask=ahead, total=128) == ((0, 8), (0, 8))
