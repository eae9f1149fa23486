"""The tables of the Triton kernels: every visible pair is visited once, whole blocks are whole, items are ordered."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.kernels.contract import Work, WorkList, whole
from longctx.kernels.mask import Mask, causal, documents, predicate, sliding_window
from longctx.kernels.positions import Tile, cut
from longctx.kernels.softmax.triton import table as tables
from longctx.kernels.softmax.triton.intervals import Intervals, intervals_of, transposed
from longctx.kernels.softmax.triton.ranges import NO_MASK, ranges_of
from longctx.kernels.softmax.triton.table import Sizes, Table, key_table, query_table
from longctx.kernels.softmax.triton.tile_table import table_of
from longctx.kernels.tiles import tiles_between, visible
from longctx.parallel.layout import Layout
from tests.kernels.mask_cases import atoms, conjunction, even_sum

LAYOUTS = [("contiguous", 1), ("zigzag", 1), ("striped", 1), ("striped", 3)]
CPU = torch.device("cpu")


def between(layout: Layout, ranks: tuple[int, int], mask: Mask, total: int) -> tuple[Tile, ...]:
    queries, keys = (cut(layout.segments(rank, total), mask.bounds(total)) for rank in ranks)
    return tiles_between(queries, keys, mask=mask, total=total)


def seen_in(tiles: tuple[Tile, ...], rows: int, columns: int) -> torch.Tensor:
    seen = torch.zeros(rows, columns, dtype=torch.int64)
    for tile in tiles:
        seen[tile.rows, tile.columns] += visible(tile, device="cpu")
    return seen


def seen_by(intervals: Intervals, rows: int, columns: int) -> torch.Tensor:
    seen = torch.zeros(rows, columns, dtype=torch.int64)
    for row, begin, end in zip(intervals.row.tolist(), intervals.begin.tolist(), intervals.end.tolist(), strict=True):
        seen[row, begin:end] += 1
    return seen


masks = st.lists(atoms(36, predicates=False), min_size=1, max_size=3).map(conjunction)
layouts = st.builds(lambda name, cp: Layout(name[0], cp, name[1]), st.sampled_from(LAYOUTS), st.sampled_from([1, 2, 3]))


@settings(max_examples=150, deadline=None)
@given(masks, layouts, st.data(), st.sampled_from([(1, 1), (4, 4), (4, 8), (16, 4), (64, 64)]))
def test_every_visible_pair_is_visited_once(mask, layout, data, blocks):
    ranks = data.draw(st.tuples(*[st.integers(0, layout.cp - 1)] * 2))
    tiles, tokens = between(layout, ranks, mask, 36), 36 // layout.cp
    want = seen_in(tiles, tokens, tokens)
    ours = intervals_of(tiles)
    for intervals, expected in ((ours, want), (transposed(ours, rows=tokens), want.T)):
        assert torch.equal(seen_by(intervals, tokens, tokens), expected)
        assert visited(intervals, tokens, *blocks).equal(expected)


def visited(intervals: Intervals, tokens: int, height: int, width: int) -> torch.Tensor:
    """Go where a kernel goes, and count what it lets through."""
    begins, ends = intervals.dense(tokens)
    ranges = ranges_of(intervals, rows=tokens, height=height, width=width)
    seen = torch.zeros(tokens, tokens, dtype=torch.int64)
    columns = torch.arange(tokens)
    for block, (first, masked, end), cost in zip(ranges.block, ranges.bounds, ranges.cost, strict=True):
        rows = slice(int(block) * height, min((int(block) + 1) * height, tokens))
        for index in range(first, end):
            begin, stop, layer = ranges.ranges[index].tolist()
            assert 0 <= begin < stop
            assert (layer == NO_MASK) == (index < masked)
            inside = (columns >= begin * width) & (columns < stop * width)
            if layer == NO_MASK:
                assert stop * width <= tokens  # kernels load whole blocks there
                seen[rows] += inside
            else:
                mine = (columns >= begins[layer, rows, None]) & (columns < ends[layer, rows, None])
                seen[rows] += inside & mine
        assert cost == (ranges.ranges[first:end, 1] - ranges.ranges[first:end, 0]).sum()
    assert ranges.block.equal(ranges.block.unique())
    return seen


def test_a_causal_square_masks_its_diagonal_only():
    ranges = ranges_of(intervals_of((Tile(0, 64, 0, 64, -63, 0),)), rows=64, height=16, width=8)
    bounds = ranges.bounds.tolist()
    found = {int(b): ranges.ranges[x[0] : x[2]].tolist() for b, x in zip(ranges.block, bounds, strict=True)}
    assert found == {
        0: [[0, 2, 0]],
        1: [[0, 2, NO_MASK], [2, 4, 0]],
        2: [[0, 4, NO_MASK], [4, 6, 0]],
        3: [[0, 6, NO_MASK], [6, 8, 0]],
    }


def test_stripes_and_short_documents_share_blocks():
    """Of 64 documents of 8 tokens on 4 ranks a tile has 2 rows: by tiles 64 pairs of blocks, by intervals 4 + 3."""
    mask = documents(tuple(range(0, 513, 8))) & causal()
    tiles = between(Layout("striped", 4), (2, 1), mask, 512)
    assert len(tiles) == 64 and {tile.q_count for tile in tiles} == {2}
    assert ranges_of(intervals_of(tiles), rows=128, height=32, width=32).cost.sum() == 4


def test_gaps_are_not_visited():
    mask = sliding_window(3, sinks=2)
    ranges = ranges_of(intervals_of(between(Layout("contiguous", 1), (0, 0), mask, 256)), rows=256, height=16, width=16)
    assert ranges.cost.max() <= 3 and ranges.cost.sum() <= 3 * 16


def test_nothing_to_do():
    assert len(ranges_of(intervals_of(()), rows=8, height=4, width=4).block) == 0
    table = query_table(whole((), heads=2, kv_heads=1), Sizes(1, 8, 8, 4, 4, None), CPU)
    assert table.items == ()
    assert query_table(WorkList(()), Sizes(1, 8, 8, 4, 4, None), CPU).items == ()


TILE = (Tile(0, 64, 0, 64, -63, 0),)
SIZES = Sizes(2, 64, 64, 16, 16, None)


def all_items(table: Table) -> list[list[int]]:
    return [row for items in table.items for row in items.tolist()]


def test_queries_have_an_item_for_each_block_row_and_head_longest_first():
    table = query_table(whole(TILE, heads=4, kv_heads=2), SIZES, CPU)
    items = all_items(table)
    # Heads of a group stand side by side: they read the same keys.
    want = [(block, row, head, head // 2) for block in (3, 2, 1, 0) for row in (0, 1) for head in range(4)]
    assert [(i[0], *i[4:7]) for i in items] == want
    costs = [sum(end - first for first, end, _ in table.ranges[i[1] : i[3]].tolist()) for i in items]
    assert costs == sorted(costs, reverse=True) and set(costs) == {1, 2, 3, 4}


def test_keys_have_an_item_for_each_block_row_and_kv_head():
    items = all_items(key_table(whole(TILE, heads=4, kv_heads=2), SIZES, CPU))
    want = [(block, row, 2 * kv, kv, 2) for block in (0, 1, 2, 3) for row in (0, 1) for kv in (0, 1)]
    assert [(i[0], *i[4:]) for i in items] == want


@pytest.mark.parametrize("programs", [1, 3, 5, 31, 32, 40])
def test_a_persistent_grid_has_every_item_once_and_shares_them_evenly(programs):
    work = whole(TILE, heads=4, kv_heads=2)
    table = query_table(work, SIZES._replace(programs=programs), CPU)
    plain = query_table(work, SIZES, CPU)
    items = all_items(table)
    assert sorted(items) == sorted(all_items(plain))
    costs = [sum(end - first for first, end, _ in table.ranges[i[1] : i[3]].tolist()) for i in items]
    loads = [sum(costs[program::programs]) for program in range(min(programs, len(items)))]
    assert max(loads) - min(loads) <= max(costs)


def test_parts_with_other_masks_and_rows():
    near = between(Layout("contiguous", 1), (0, 0), sliding_window(3, sinks=1), 64)
    work = WorkList(
        (
            Work(slice(0, 1), slice(0, 4), slice(0, 2), TILE),
            Work(slice(1, 2), slice(0, 1), slice(0, 1), near),
            Work(slice(1, 2), slice(1, 2), slice(0, 1), TILE),
            Work(slice(1, 2), slice(2, 4), slice(1, 2), near),
        )
    )
    want = torch.zeros(2, 4, 64, 64, dtype=torch.int64)
    for part in work.parts:
        want[part.rows, part.heads] = seen_in(part.tiles, 64, 64)
    for table, by_keys in ((query_table(work, SIZES, CPU), False), (key_table(work, SIZES, CPU), True)):
        got = torch.zeros_like(want)
        for block, first, masked, end, row, head, kv_head, heads in all_items(table):
            assert [h // 2 for h in range(head, head + heads)] == [kv_head] * heads
            rows = slice(16 * block, 16 * block + 16)
            for index in range(first, end):
                begin, stop, layer = table.ranges[index].tolist()
                at = torch.arange(64)
                inside = (at >= 16 * begin) & (at < 16 * stop)
                if index >= masked:
                    inside = inside & (at >= table.begins[layer, rows, None]) & (at < table.ends[layer, rows, None])
                for h in range(head, head + heads):
                    (got[row, h].T if by_keys else got[row, h])[rows] += inside
        assert got.equal(want)
    # The two parts that share a KV head of a row are launched one after the other.
    for items in key_table(work, SIZES, CPU).items:
        blocks = [(i[0], i[4], i[6]) for i in items.tolist()]
        assert len(set(blocks)) == len(blocks)
    assert len(key_table(work, SIZES, CPU).items) == 2


def test_tables_are_made_once_and_forgotten_with_their_work():
    work = whole(TILE, heads=4, kv_heads=2)
    first = query_table(work, SIZES, CPU)
    assert query_table(work, SIZES, CPU) is first
    assert key_table(work, SIZES, CPU) is not first
    assert query_table(work, SIZES._replace(q_block=32), CPU) is not first
    before = len(tables._kept)
    del work
    assert len(tables._kept) == before - 1


def test_predicates_have_no_intervals():
    tiles = between(Layout("contiguous", 1), (0, 0), causal() & predicate(even_sum), 8)
    with pytest.raises(AssertionError, match="no predicate"):
        intervals_of(tiles)


def test_long_sequences_have_small_tables():
    """A million causal tokens in one tile: ranges per block, not per pair of blocks."""
    tokens = 2**20
    ranges = ranges_of(intervals_of((Tile(0, tokens, 0, tokens, 1 - tokens, 0),)), rows=tokens, height=128, width=64)
    assert len(ranges.ranges) == 2 * tokens // 128 - 1


def test_stripes_of_some_width_are_transposed_in_linear_memory(monkeypatch):
    """A tile for each stripe reaches to all earlier keys; by their columns they would be T^2 / (2 width) rows."""
    tiles = between(Layout("striped", 2, 16), (1, 0), causal(), 2**14)
    tokens, made = 2**13, []
    expand = torch.repeat_interleave
    monkeypatch.setattr(torch, "repeat_interleave", lambda *a, **k: made.append(expand(*a, **k)) or made[-1])
    keys = transposed(intervals_of(tiles), rows=tokens)
    assert len(tiles) >= 512 and max(map(len, made)) <= 2 * tokens
    assert len(keys.row) == tokens and bool((keys.end == tokens).all())


def test_a_head_in_two_lists_is_refused():
    """One launch would have two programs that write to the same rows."""
    part = Work(slice(None), slice(0, 2), slice(0, 1), TILE)
    with pytest.raises(AssertionError, match="a head twice"):
        query_table(WorkList((part, part)), SIZES, CPU)


def test_tight_blocks_of_keys():
    entry = table_of("sm_90").entry(torch.bfloat16, 96, 96)
    assert entry.dkv_tight not in (None, entry.dkv)
    assert entry.key_gradients(softcap=False, head_dims=(128, 128)) == entry.dkv
    assert entry.key_gradients(softcap=True, head_dims=(128, 128)) == entry.dkv_tight
    assert entry.key_gradients(softcap=False, head_dims=(96, 128)) == entry.dkv_tight
