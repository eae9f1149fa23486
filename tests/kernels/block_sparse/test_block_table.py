"""Tables of blocks against the mask that flex_attention would make of them."""

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask

from longctx.kernels.block_sparse.block_table import from_block_table
from longctx.kernels.block_sparse.selection import allowed

BLOCK, TOTAL, HEADS = 4, 22, 2
ROWS = -(-TOTAL // BLOCK)
POSITIONS = torch.arange(TOTAL)


def some_table(rows: int = 2, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a table of some blocks in no order, of the future among them; nonsense behind the count."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, ROWS + 1, (rows, HEADS, ROWS), generator=generator)
    indices = torch.rand(rows, HEADS, ROWS, ROWS, generator=generator).argsort(-1)
    indices = torch.where(torch.arange(ROWS) < counts[..., None], indices, 99)
    return counts.int(), indices.int()


def documents(rows: int = 2) -> torch.Tensor:
    return torch.tensor([[0] * 9 + [9] + [10] * 12, [0] * 22])[:rows]


@pytest.mark.parametrize(("table_rows", "document_rows"), [(2, 2), (1, 2), (2, 1)])
def test_a_table_is_its_block_mask(table_rows, document_rows):
    counts, indices = some_table(table_rows)
    first = documents(document_rows)
    selection = from_block_table(counts, indices, block_size=BLOCK, positions=POSITIONS, first=first)
    dense = torch.zeros(table_rows, HEADS, TOTAL, TOTAL, dtype=torch.bool)
    for row, head, query in torch.cartesian_prod(*(torch.arange(n) for n in (table_rows, HEADS, ROWS))).tolist():
        for block in indices[row, head, query, : counts[row, head, query]].tolist():
            dense[row, head, query * BLOCK : (query + 1) * BLOCK, block * BLOCK : (block + 1) * BLOCK] = True
    same = first[:, None, :, None] == first[:, None, None, :]
    assert torch.equal(allowed(selection, POSITIONS), dense & same & torch.ones(TOTAL, TOTAL).tril().bool())


def test_the_tables_of_a_block_mask_go_in():
    counts = torch.tensor([[[1, 2]]], dtype=torch.int32)
    indices = torch.tensor([[[[0, 0], [1, 0]]]], dtype=torch.int32)
    mask = BlockMask.from_kv_blocks(counts, indices, BLOCK_SIZE=BLOCK)
    first = torch.zeros(1, 8, dtype=torch.int64)
    selection = from_block_table(
        mask.kv_num_blocks, mask.kv_indices, block_size=BLOCK, positions=torch.arange(8), first=first
    )
    assert torch.equal(allowed(selection, torch.arange(8))[0, 0], torch.ones(8, 8).tril().bool())


def test_some_queries_see_the_same():
    counts, indices = some_table()
    some = torch.tensor([20, 21, 4, 5, 6, 7])
    whole = from_block_table(counts, indices, block_size=BLOCK, positions=POSITIONS, first=documents())
    part = from_block_table(counts, indices, block_size=BLOCK, positions=some, first=documents()[:, some])
    assert torch.equal(allowed(part, POSITIONS), allowed(whole, POSITIONS)[:, :, some])


def changed(which: str, value) -> dict:
    counts = torch.full((1, 1, ROWS), 2)
    indices = torch.tensor([0, 1, 2]).expand(1, 1, ROWS, 3).clone()
    given = {
        "kv_num_blocks": counts,
        "kv_indices": indices,
        "block_size": BLOCK,
        "positions": POSITIONS,
        "first": torch.zeros(1, TOTAL, dtype=torch.int64),
    }
    given[which] = value(given[which])
    return given


def put(place, number):
    def change(x):
        x = x.clone()
        x[place] = number
        return x

    return change


@pytest.mark.parametrize(
    ("which", "value", "words"),
    [
        ("kv_indices", put((0, 0, 3, 1), 0), "lists block 0 twice for queries of block 3 .row 0, head 0."),
        ("kv_indices", put((0, 0, 3, 1), ROWS), f"must be 0 to {ROWS - 1}, the blocks of the table; given {ROWS}"),
        ("kv_indices", put((0, 0, 3, 0), -1), "given -1"),
        ("kv_num_blocks", put((0, 0, 1), 4), "kv_num_blocks must be 0 to 3, the last size of kv_indices; given 2 to 4"),
        ("kv_num_blocks", put((0, 0, 1), -1), "given -1 to 2"),
        ("kv_num_blocks", lambda x: x[:, :, 1:], r"need kv_num_blocks \[R, HS, NQ\]"),
        ("kv_indices", lambda x: x[0], r"need kv_num_blocks \[R, HS, NQ\]"),
        ("kv_indices", lambda x: x.float(), "kv_indices must be int32 or int64; given torch.float32"),
        ("block_size", lambda x: 0, "block_size must be >= 1"),
        ("block_size", lambda x: 2, "has 6 blocks of queries of 2 tokens; the positions need 11"),
        ("first", lambda x: x[:, 1:], "need positions .T. and first"),
        ("first", lambda x: x[0], "need positions .T. and first"),
    ],
)
def test_wrong_tables_are_refused(which, value, words):
    given = changed(which, value)
    with pytest.raises(ValueError, match=words):
        from_block_table(given.pop("kv_num_blocks"), given.pop("kv_indices"), **given)


def test_rows_that_do_not_fit_are_refused():
    counts, indices = some_table(2)
    with pytest.raises(ValueError, match="the table has 2 rows, first has 3"):
        from_block_table(
            counts, indices, block_size=BLOCK, positions=POSITIONS, first=torch.zeros(3, TOTAL, dtype=torch.int64)
        )


def test_what_is_behind_the_count_is_not_read():
    given = changed("kv_indices", put((..., 2), -7))
    selection = from_block_table(given.pop("kv_num_blocks"), given.pop("kv_indices"), **given)
    assert allowed(selection, POSITIONS)[0, 0, 21].nonzero().flatten().tolist() == list(range(8))
