"""What a selection asks of others: the blocks it reaches, and how far away its slots are."""

from dataclasses import replace

import pytest
import torch

from longctx.kernels.block_sparse.patterns.strided import Strided
from longctx.kernels.block_sparse.selection import allowed
from longctx.parallel.layout import Layout
from longctx.parallel.loopback import run_ranks
from longctx.parallel.schedules.ring import Ring, Ulysses, Usp
from longctx.sparse_attention import ContextParallelSparseAttention
from longctx.sparse_moves import distances, wanted_blocks
from tests.support.selections import BLOCK, document_starts, nothing, random_blocks, random_classes, two_parts

TOTAL = 46  # the last block is short
DOCUMENTS = torch.stack([document_starts((0, 5, 22, TOTAL)), document_starts((0, TOTAL))])
SOME = torch.tensor([3, 23, 24, 25, 45])


def strided(positions, document_of):
    made = Strided(stride=7).selection(positions=positions, document_of=document_of, num_heads=4, num_kv_heads=2)
    return replace(made, block_size=BLOCK, beside=replace(made.beside, block_size=BLOCK))


def no_key(positions, document_of):
    made = random_classes(positions, document_of, heads=2)
    return replace(made, key_class=torch.full_like(made.key_class, -1))


MAKE = {
    "blocks": lambda at, of: random_blocks(at, of, heads=2, slots=3),
    "classes": lambda at, of: random_classes(at, of, heads=2),
    "two_parts": lambda at, of: two_parts(at, of, heads=4, beside_heads=2),
    "alike": strided,
    "nothing": lambda at, of: nothing(at, of, heads=2),
    "keys of no class": lambda at, of: replace(
        made := random_classes(at, of, heads=2), key_class=-1 + 0 * made.key_class
    ),
}


def of_whole_blocks(part, slot):
    """Return one slot as far as the blocks that it reaches into: of classes, no closer is told."""
    lo, hi = part.lo[..., slot, None], part.hi[..., slot, None]
    whole = torch.where(hi < lo, hi, hi // BLOCK * BLOCK + BLOCK - 1)
    slot_class = None if part.slot_class is None else part.slot_class[..., slot, None]
    return replace(part, lo=torch.where(hi < lo, lo, lo // BLOCK * BLOCK), hi=whole, slot_class=slot_class)


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("row", [0, 1])
def test_blocks_are_those_of_the_keys_that_are_seen(name, row):
    selection = MAKE[name](SOME, DOCUMENTS[row, None])
    seen = torch.zeros(TOTAL, dtype=torch.bool)
    for part in selection.parts():
        for slot in range(part.slots):
            seen |= allowed(of_whole_blocks(part, slot), torch.arange(TOTAL)).flatten(0, 2).any(0)
    blocks = torch.nn.functional.pad(seen, (0, -TOTAL % BLOCK)).view(-1, BLOCK).any(-1)
    assert torch.equal(wanted_blocks(selection, block_size=BLOCK, total=TOTAL), blocks)
    assert blocks.any() == (name not in ("nothing", "keys of no class"))


def test_distances_of_all_parts_count():
    selection = two_parts(SOME, DOCUMENTS, heads=4, beside_heads=2)
    told = [distances(each, SOME, block_size=BLOCK, buckets=6) for each in (selection, *selection.parts())]
    assert told[0] == [a + b for a, b in zip(told[1], told[2], strict=True)]
    assert told[1] == [2 * 4 * len(SOME), 0, 0, 0, 0, 0]
    assert sum(told[2]) > 0


def test_a_plan_and_a_selection_serve_any_schedule():
    total, schedules = 32, {"usp": Usp(ulysses=2), "ring": Ring(), "ulysses": Ulysses()}
    whole = torch.randn(3, 1, total, 4, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    layout = Layout("contiguous", 4)

    def on_rank(transport):
        attention = {
            name: ContextParallelSparseAttention(layout=layout, schedule=schedule, transport=transport)
            for name, schedule in schedules.items()
        }
        plan = attention["usp"].plan(None, total=total, device=torch.device("cpu"))
        selection = random_blocks(layout.positions(transport.rank, total), plan.document_of, heads=4, slots=3)
        shards = [layout.shard(x, rank=transport.rank, dim=1) for x in whole]
        return {name: each(*shards, selection=selection, plan=plan) for name, each in attention.items()}

    for outs in run_ranks(4, on_rank):
        torch.testing.assert_close(outs["ring"], outs["usp"], rtol=0, atol=1e-12)
        torch.testing.assert_close(outs["ulysses"], outs["usp"], rtol=0, atol=1e-12)
