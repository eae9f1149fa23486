"""Tiles between any two shards cover exactly the pairs that the mask allows, each once."""

import itertools

import pytest
import torch

from longctx.kernels.mask import Mask, causal, documents, full, sliding_window
from longctx.kernels.positions import cut
from longctx.kernels.tiles import tiles_between
from longctx.parallel.layout import Layout

TOTAL = 48
DOCUMENTS = documents((0, 1, 2, 19, 40, 41, 48))
MASKS = {
    "full": full(),
    "causal": causal(),
    "window": sliding_window(5),
    "window1": sliding_window(0),
    "two_sided": sliding_window(3, 2),
    "lookahead": Mask(right=4),
    "documents": DOCUMENTS & causal(),
    "documents_window": DOCUMENTS & sliding_window(4),
    "documents_full": DOCUMENTS,
}
LAYOUTS = [("contiguous", 1), ("zigzag", 1), ("striped", 1), ("striped", 2), ("striped", 3), ("striped", 5)]


def tiles(layout: Layout, q_rank: int, k_rank: int, mask: Mask, total: int):
    q, k = (cut(layout.segments(rank, total), mask.bounds(total)) for rank in (q_rank, k_rank))
    return tiles_between(q, k, mask=mask)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize(("name", "width"), LAYOUTS, ids=[f"{n}{w}" for n, w in LAYOUTS])
def test_tiles_cover_the_mask_once(name, width, mask):
    for cp in (1, 2, 3, 4, 8):
        layout = Layout(name, cp, width)
        for q_rank, k_rank in itertools.product(range(cp), repeat=2):
            q_positions, k_positions = layout.positions(q_rank, TOTAL), layout.positions(k_rank, TOTAL)
            want = mask.allowed(q_positions, k_positions)
            got = torch.zeros_like(want, dtype=torch.int64)
            for tile in tiles(layout, q_rank, k_rank, mask, TOTAL):
                for i in range(tile.q_count):
                    for j in range(tile.k_count):
                        got[tile.q_begin + i, tile.k_begin + j] += tile.lo <= j - i <= tile.hi
            assert torch.equal(got, want.long()), (cp, q_rank, k_rank)


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


def test_wide_stripes_need_a_few_tiles_per_stripe_not_a_square():
    layout, total = Layout("striped", 8, 64), 8 * 64 * 256
    assert len(tiles(layout, 3, 5, causal(), total)) <= 2 * 256
