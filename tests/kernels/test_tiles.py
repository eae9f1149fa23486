"""Tiles between any two shards cover exactly the pairs that the mask allows, each once."""

import itertools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.kernels.mask import (
    Mask,
    causal,
    chunked,
    documents,
    full,
    predicate,
    prefix_lm,
    sliding_window,
)
from longctx.kernels.positions import Tile, cut
from longctx.kernels.predicate import TilePredicate
from longctx.kernels.tiles import tiles_between, visible
from longctx.parallel.layout import Layout
from tests.kernels.mask_cases import atoms, conjunction, even_sum

TOTAL = 48
BOUNDS = (0, 1, 2, 19, 40, 41, 48)
DOCUMENTS = documents(BOUNDS)
MASKS = {
    "full": full(),
    "causal": causal(),
    "window": sliding_window(5),
    "window1": sliding_window(0),
    "two_sided": sliding_window(3, 2),
    "lookahead": sliding_window(None, 4),
    "documents": DOCUMENTS & causal(),
    "documents_window": DOCUMENTS & sliding_window(4),
    "documents_full": DOCUMENTS,
    "sinks": sliding_window(4, sinks=3),
    "two_sided_sinks": DOCUMENTS & sliding_window(2, 3, sinks=3),
    "prefix": prefix_lm(7),
    "prefix_per_document": prefix_lm((1, 0, 5, 21, 1, 3), BOUNDS),
    "chunked": chunked(6) & chunked(8) & DOCUMENTS & causal(),
    "prefix_window": prefix_lm(9) & sliding_window(6, 6),
    "nothing": Mask(()),
    "predicate": predicate(even_sum) & DOCUMENTS & sliding_window(4, sinks=2),
}
LAYOUTS = [("contiguous", 1), ("zigzag", 1), ("striped", 1), ("striped", 2), ("striped", 3), ("striped", 5)]
layouts = st.builds(
    lambda layout, cp: Layout(layout[0], cp, layout[1]), st.sampled_from(LAYOUTS), st.sampled_from([1, 2, 3, 4, 6])
)


def tiles(layout: Layout, q_rank: int, k_rank: int, mask: Mask, total: int):
    q, k = (cut(layout.segments(rank, total), mask.bounds(total)) for rank in (q_rank, k_rank))
    return tiles_between(q, k, mask=mask, total=total)


def counted(some: tuple[Tile, ...], like: torch.Tensor) -> torch.Tensor:
    """Return how often each pair is visible in the tiles, checking that every tile counts its own."""
    got = torch.zeros_like(like, dtype=torch.int64)
    for tile in some:
        seen = visible(tile, device="cpu")
        assert tile.pairs == seen.sum() > 0
        assert not tile.full or seen.all()
        got[tile.rows, tile.columns] += seen
    return got


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize(("name", "width"), LAYOUTS, ids=[f"{n}{w}" for n, w in LAYOUTS])
def test_tiles_cover_the_mask_once(name, width, mask):
    for cp in (1, 2, 3, 4, 8):
        layout = Layout(name, cp, width)
        for q_rank, k_rank in itertools.product(range(cp), repeat=2):
            want = mask.allowed(layout.positions(q_rank, TOTAL), layout.positions(k_rank, TOTAL))
            got = counted(tiles(layout, q_rank, k_rank, mask, TOTAL), want)
            assert torch.equal(got, want.long()), (cp, q_rank, k_rank)


@settings(deadline=None)
@given(st.data(), layouts)
def test_tiles_of_any_mask_on_any_layout(data, layout):
    total = layout.cp * data.draw(st.integers(1, 9))
    if total < 2:
        total = 2 * layout.cp
    mask = conjunction(data.draw(st.lists(atoms(total), min_size=1, max_size=3)))
    q_rank, k_rank = (data.draw(st.integers(0, layout.cp - 1)) for _ in range(2))
    want = mask.allowed(layout.positions(q_rank, total), layout.positions(k_rank, total))
    assert torch.equal(counted(tiles(layout, q_rank, k_rank, mask, total), want), want.long())


def test_visible_is_the_band():
    tile = Tile(3, 4, 2, 5, -1, 2)
    want = [[-1 <= j - i <= 2 for j in range(5)] for i in range(4)]
    assert visible(tile, device="cpu").tolist() == want


def test_striped_causal_bands_are_the_diagonal_or_one_below():
    layout = Layout("striped", 4)
    for q_rank, k_rank in itertools.product(range(4), repeat=2):
        (tile,) = tiles(layout, q_rank, k_rank, causal(), 64)
        assert tile.hi == (0 if k_rank <= q_rank else -1)


def test_zigzag_causal_tiles_are_full_or_diagonal():
    layout = Layout("zigzag", 4)
    for q_rank, k_rank in itertools.product(range(4), repeat=2):
        both = tiles(layout, q_rank, k_rank, causal(), 64)
        assert all(tile.full or tile.hi == 0 for tile in both)
        assert sum(not tile.full for tile in both) == (2 if q_rank == k_rank else 0)


def test_far_sinks_are_one_full_tile_of_the_sinks_alone():
    layout, mask = Layout("contiguous", 8), sliding_window(5, sinks=3)
    (tile,) = tiles(layout, 6, 0, mask, 8 * 64)
    assert tile == Tile(0, 64, 0, 3, -63, 2) and tile.full
    assert tiles(layout, 6, 1, mask, 8 * 64) == ()


def test_wide_stripes_need_a_few_tiles_per_stripe_not_a_square():
    layout, total = Layout("striped", 8, 64), 8 * 64 * 256
    assert len(tiles(layout, 3, 5, causal(), total)) <= 2 * 256
    assert len(tiles(layout, 3, 5, prefix_lm(total // 2), total)) <= 4 * 256
    assert len(tiles(layout, 3, 5, sliding_window(4000, sinks=100), total)) <= 5 * 256


def test_many_documents_are_one_tile_each():
    total = 1 << 16
    cuts = random.Random(0).sample(range(1, total), 999)
    mask = causal() & documents((0, *sorted(cuts), total))
    assert len(tiles(Layout("contiguous", 1), 0, 0, mask, total)) == 1000


def test_a_tile_under_a_predicate_knows_its_positions():
    mask = causal() & predicate(even_sum)
    layout = Layout("zigzag", 2)
    some = tiles(layout, 1, 0, mask, 16)
    assert some and len({hash(tile) for tile in some}) == len(some)
    q, k = layout.positions(1, 16), layout.positions(0, 16)
    for tile in some:
        assert isinstance(tile.predicate, TilePredicate) and not tile.full
        want = even_sum(q[tile.rows, None], k[None, tile.columns])
        assert torch.equal(tile.predicate.visible(device="cpu"), want)


def test_what_a_predicate_empties_is_no_tile():
    assert tiles(Layout("contiguous", 2), 1, 0, predicate(lambda q, k: q < 0 * k), 16) == ()


def test_predicates_are_counted_some_rows_at_a_time(monkeypatch):
    (tile,) = tiles(Layout("contiguous", 1), 0, 0, sliding_window(7, 3) & predicate(even_sum), 50)
    whole = tile.pairs
    monkeypatch.setattr("longctx.kernels.predicate.PAIRS_AT_ONCE", 170)
    assert tile.pairs == whole == visible(tile, device="cpu").sum()
