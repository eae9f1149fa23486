"""NSA's compressed blocks, their importance and the blocks they point at, against the paper's, query by query."""

import pytest
import torch

from longctx.kernels.block_sparse.blocks import block_mean, blocks_of
from longctx.kernels.block_sparse.routing.nsa import compressed, compressed_seen, importance, nsa_blocks
from tests.kernels.block_sparse.routing_cases import chosen_sets, documents, draw, nsa_choice, nsa_compressed

ROWS = ((13, 1, 7, 20, 2), (43,), (5, 3, 1, 1, 33))
TOTAL = 43
GRIDS = [(2, 4, 8), (2, 2, 4), (1, 3, 3), (4, 8, 8), (3, 6, 6), (2, 6, 8)]  # stride, size, block_size


def all_blocks(size, document_of):
    count = -(-document_of.shape[1] // size)
    return blocks_of(torch.arange(count), block_size=size, total=document_of.shape[1], document_of=document_of)


def compress(x, document_of, *, stride, size):
    cells = all_blocks(stride, document_of)
    return compressed(block_mean(x, cells), cells=cells, size=size)


@pytest.mark.parametrize(("stride", "size", "block_size"), GRIDS)
def test_what_queries_see_of_compressed_blocks(stride, size, block_size):
    document_of = documents(*ROWS)
    x = draw(3, TOTAL, 2, 3, seed=1).requires_grad_()
    got = compress(x, document_of, stride=stride, size=size)
    seen = compressed_seen(positions=torch.arange(TOTAL), first=document_of, stride=stride, size=size)
    assert got.shape == (3, -(-TOTAL // stride), 2, 3) and seen.shape == (3, TOTAL, 2)
    pairs = []
    for row in range(3):
        for t in range(TOTAL):
            want = nsa_compressed(x[row], t, int(document_of[row, t]), size=size, stride=stride)
            assert list(range(*seen[row, t].tolist())) == list(want)
            pairs += [(got[row, block], mean) for block, mean in want.items()]
    ours, theirs = (torch.stack(each) for each in zip(*pairs, strict=True))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    weights = draw(*ours.shape, seed=2)
    (dours,), (dtheirs,) = (
        torch.autograd.grad((each * weights).sum(), x, retain_graph=True) for each in (ours, theirs)
    )
    torch.testing.assert_close(dours, dtheirs, rtol=0, atol=1e-12)


def test_a_compressed_block_is_of_the_document_of_its_last_token():
    document_of = documents((3, 9))
    x = draw(1, 12, 1, 1, seed=1)
    got = compress(x, document_of, stride=2, size=4)[0, :, 0, 0]
    torch.testing.assert_close(got[0], x[0, 3, 0, 0])  # tokens 0 to 3, of which only 3 is in the second document
    torch.testing.assert_close(got[1], x[0, 3:6].mean())
    assert list(range(*compressed_seen(positions=torch.tensor(5), first=torch.tensor(3), stride=2, size=4))) == [1]


def test_less_than_one_compressed_block():
    got = compress(draw(1, 3, 1, 2, seed=1), documents((3,)), stride=2, size=8)
    assert got.shape == (1, 2, 1, 2) and got.isfinite().all()
    seen = compressed_seen(positions=torch.arange(3), first=documents((3,)), stride=2, size=8)
    assert (seen[..., 0] == seen[..., 1]).all()


@pytest.mark.parametrize(("stride", "size", "block_size"), GRIDS)
def test_importance_is_equation_9(stride, size, block_size):
    count, blocks = -(-TOTAL // stride), -(-TOTAL // block_size)
    weights = draw(5, count, seed=1)
    got = importance(weights, size=size, stride=stride, block_size=block_size, blocks=blocks)
    per_block = block_size // stride
    for block in range(blocks):
        cells = [per_block * block + m - n for m in range(per_block) for n in range(size // stride)]
        want = sum((weights[:, cell] for cell in cells if 0 <= cell < count), torch.zeros(5))
        torch.testing.assert_close(got[:, block], want, rtol=0, atol=1e-12)


def choice(q, k, document_of, *, stride, size, block_size, select, local, **options):
    keys = compress(k, document_of, stride=stride, size=size)
    return nsa_blocks(
        q,
        keys,
        blocks=all_blocks(block_size, document_of),
        positions=torch.arange(k.shape[1]),
        first=document_of,
        stride=stride,
        size=size,
        select=select,
        local=local,
        **options,
    )


@pytest.mark.parametrize(("stride", "size", "block_size"), [(2, 4, 4), (1, 3, 3), (2, 2, 4)])
@pytest.mark.parametrize(("select", "local"), [(2, 1), (4, 2), (5, 2), (30, 3)])
@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (3, 1)])
def test_choice(stride, size, block_size, select, local, heads):
    document_of = documents(*ROWS)
    q, k = (2 * draw(3, TOTAL, count, 4, seed=seed) for seed, count in enumerate(heads))
    grid = {"stride": stride, "size": size, "block_size": block_size, "select": select, "local": local}
    got = choice(q, k, document_of, **grid)
    assert got.shape == (3, TOTAL, heads[1], min(select, -(-TOTAL // block_size)))
    group = heads[0] // heads[1]
    want = [
        [
            [
                sorted(
                    nsa_choice(
                        q[row, :, head * group : (head + 1) * group].transpose(0, 1),
                        k[row, :, head],
                        t,
                        int(document_of[row, t]),
                        **grid,
                    )
                )
                for head in range(heads[1])
            ]
            for t in range(TOTAL)
        ]
        for row in range(3)
    ]
    assert chosen_sets(got) == want


def test_the_softcap_of_compressed_attention_decides_too():
    grid = {"stride": 2, "size": 2, "block_size": 2, "select": 4, "local": 1}
    q, k = 8 * draw(1, TOTAL, 2, 4, seed=1), 8 * draw(1, TOTAL, 1, 4, seed=2)
    document_of = documents((TOTAL,))
    got = choice(q, k, document_of, **grid, softcap=1e9)
    assert torch.equal(got, choice(q, k, document_of, **grid))
    assert not torch.equal(got, choice(q, k, document_of, **grid, softcap=1.0))


def test_any_chunks_and_one_row_of_documents_for_all():
    grid = {"stride": 2, "size": 4, "block_size": 4, "select": 5, "local": 2}
    q, k = draw(2, TOTAL, 4, 4, seed=1), draw(2, TOTAL, 2, 4, seed=2)
    want = choice(q, k, documents(ROWS[0], ROWS[0]), **grid)
    for scores in (1, 1000, 1 << 24):
        assert torch.equal(choice(q, k, documents(ROWS[0]), **grid, scores=scores), want)
