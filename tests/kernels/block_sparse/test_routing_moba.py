"""MoBA's choice against the paper's, query by query."""

import pytest
import torch

from longctx.kernels.block_sparse.blocks import block_mean, blocks_of
from longctx.kernels.block_sparse.routing.moba import moba_blocks
from tests.kernels.block_sparse.routing_cases import chosen_sets, documents, draw, moba_choice

BLOCK = 4
ROWS = ((13, 1, 7, 20, 2), (43,), (5, 3, 1, 1, 33))
TOTAL = 43


def choice(q, k, document_of, *, topk, scores=1 << 24):
    count = -(-k.shape[1] // BLOCK)
    blocks = blocks_of(torch.arange(count), block_size=BLOCK, total=k.shape[1], document_of=document_of)
    return moba_blocks(
        q,
        block_mean(k, blocks),
        blocks=blocks,
        positions=torch.arange(k.shape[1]),
        first=document_of,
        topk=topk,
        scores=scores,
    )


@pytest.mark.parametrize("topk", [1, 2, 3, 20])
@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (3, 1)])
@pytest.mark.parametrize("whole", [False, True])
def test_choice(topk, heads, whole):
    q, k = (draw(3, TOTAL, count, 4, seed=seed, whole=whole) for seed, count in enumerate(heads))
    document_of = documents(*ROWS)
    got = choice(q, k, document_of, topk=topk)
    assert got.shape == (3, TOTAL, heads[0], min(topk - 1, 11) + 1)
    want = [
        [
            [
                sorted(
                    moba_choice(
                        q[row, :, head],
                        k[row, :, head * heads[1] // heads[0]],
                        t,
                        int(document_of[row, t]),
                        size=BLOCK,
                        topk=topk,
                    )
                )
                for head in range(heads[0])
            ]
            for t in range(TOTAL)
        ]
        for row in range(3)
    ]
    assert chosen_sets(got) == want


def test_equal_scores_choose_the_first_blocks():
    q, k = torch.zeros(1, TOTAL, 1, 4, dtype=torch.float64), draw(1, TOTAL, 1, 4, seed=1)
    got = choice(q, k, documents((TOTAL,)), topk=3)
    assert got[0, -1, 0].tolist() == [0, 1, 10]
    assert got[0, 6, 0].tolist() == [0, -1, 1]


def test_one_row_of_documents_for_all_rows_and_any_chunks():
    q, k = draw(3, TOTAL, 4, 4, seed=1), draw(3, TOTAL, 2, 4, seed=2)
    one = documents(ROWS[0])
    want = choice(q, k, one.expand(3, -1), topk=3)
    for scores in (1, 300, 1 << 24):
        assert torch.equal(choice(q, k, one, topk=3, scores=scores), want)
