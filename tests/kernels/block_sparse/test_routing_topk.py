"""The stable top-k against a stable sort; chunks: the same bits however many there are and whoever has the blocks."""

import pytest
import torch

from longctx.kernels.block_sparse.routing.topk import chunk_shape, chunks, route, scored, top_blocks
from tests.kernels.block_sparse.routing_cases import best, documents, draw

BLOCK = 4


def test_of_equals_the_lowest_block_is_chosen_and_minus_infinity_never():
    inf = float("inf")
    scores = torch.tensor([[1.0, 3.0, 1.0, 3.0, 3.0], [-inf, 2.0, -inf, -inf, 2.0], [-inf] * 5, [0.0] * 4 + [inf]])
    assert top_blocks(scores, 2).tolist() == [[1, 3], [1, 4], [-1, -1], [0, 4]]
    assert top_blocks(scores, 4).tolist() == [[0, 1, 3, 4], [1, 4, -1, -1], [-1] * 4, [0, 1, 2, 4]]


@pytest.mark.parametrize("count", [0, 1, 3, 9, 12])
def test_top_blocks_is_a_stable_sort(count):
    scores = draw(40, 9, seed=1, whole=True).masked_fill(draw(40, 9, seed=2) > 0.5, float("-inf"))
    got = top_blocks(scores.float(), count)
    assert got.shape == (40, min(count, 9)) and got.dtype == torch.int64
    for row, blocks in zip(scores.tolist(), got.tolist(), strict=True):
        there = {block: score for block, score in enumerate(row) if score != float("-inf")}
        chosen = sorted(best(there, count))
        assert blocks == chosen + [-1] * (len(blocks) - len(chosen))


def test_chunks_are_bounded_and_of_whole_heads_first():
    assert chunk_shape(batch=1, kv_heads=2, rows=8, keys=4, scores=64 * 3) == (3, 2)
    assert chunk_shape(batch=1, kv_heads=3, rows=8, keys=4, scores=64) == (1, 2)
    assert chunk_shape(batch=2, kv_heads=3, rows=8, keys=4, scores=1) == (1, 1)
    assert chunk_shape(batch=1, kv_heads=1, rows=1, keys=0)[0] == 16


def raw(q, means, tokens, *, scores=1 << 24, first=None):
    """Return the scores of some tokens, `[B, T, H, N]`, as `route` hands them on."""
    first = torch.zeros(1, len(tokens), dtype=torch.int64) if first is None else first[:, tokens]

    def choose(scores, chunk):
        assert chunk.positions.shape == (scores.shape[1], BLOCK) and chunk.first.shape[1:] == chunk.positions.shape
        return scores.permute(0, 1, 4, 2, 3, 5).flatten(3, 4)

    return route(q[:, tokens], means, block_size=BLOCK, positions=tokens, first=first, choose=choose, scores=scores)


@pytest.mark.parametrize("scores", [1, 100, 1000, 1 << 24])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 2)])
def test_chunks_cover_all_tokens_and_heads(scores, heads):
    total = 4 * BLOCK + 3
    q, means = draw(2, total, heads[0], 5, seed=1), draw(2, 5, heads[1], 5, seed=2)
    want = torch.einsum("bthd,bnhd->bthn", q, means.repeat_interleave(heads[0] // heads[1], dim=2))
    torch.testing.assert_close(raw(q, means, torch.arange(total), scores=scores), want, rtol=0, atol=1e-12)


def test_a_chunk_knows_its_queries():
    total, document_of = 19, documents((3, 16), (10, 9))
    q = torch.arange(total, dtype=torch.float64)[None, :, None, None].expand(2, total, 2, 3)
    shape = (2, 1)
    seen = []
    for chunk in chunks(q, kv_heads=2, block_size=BLOCK, positions=torch.arange(total), first=document_of, shape=shape):
        assert torch.equal(chunk.q[0, :, 0, 0, :, 0], chunk.positions.double())
        seen += [chunk.positions.flatten()] if chunk.heads.start == 0 else []
        there = chunk.positions.flatten()
        assert torch.equal(chunk.first.flatten(1)[:, : total - chunk.tokens.start], document_of[:, chunk.tokens])
        assert (there[max(0, total - chunk.tokens.start) :] == 0).all()
    assert torch.equal(torch.cat(seen)[:total], torch.arange(total))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_scores_are_the_same_bits_whoever_has_the_blocks(dtype):
    """33 blocks of queries: as one rank, as ranks of 1, 2, 7 blocks from anywhere, and the last, short one."""
    total, width = 32 * BLOCK + 3, 37
    q, means = draw(1, total, 6, width, seed=3).to(dtype), draw(1, 33, 3, width, seed=4).float()
    everything = raw(q, means, torch.arange(total), scores=20_000)
    for some in ([0], [32], [5, 31], [1, 2, 3, 17, 30, 31, 32], list(range(3, 33, 3))):
        tokens = torch.cat([torch.arange(total)[block * BLOCK : (block + 1) * BLOCK] for block in some])
        assert torch.equal(raw(q, means, tokens, scores=20_000), everything[:, tokens])


def test_a_rank_without_tokens():
    got = raw(draw(1, 0, 4, 5, seed=1), draw(1, 3, 2, 5, seed=2), torch.arange(0))
    assert got.shape == (1, 0, 4, 3)


def test_scores_are_not_rounded_under_autocast():
    q, means = draw(1, 8, 2, 64, seed=1).float(), draw(1, 2, 2, 64, seed=2).float()
    want = raw(q, means, torch.arange(8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(raw(q, means, torch.arange(8)), want)


def test_scored_is_per_block_of_queries():
    """Each block of queries is a matrix product of its own: what lies beside it has no influence on its bits."""
    q, means = draw(1, 3 * BLOCK, 2, 33, seed=5).float(), draw(1, 3, 2, 33, seed=6).float()
    first = torch.zeros(1, 3 * BLOCK, dtype=torch.int64)
    there = {"kv_heads": 2, "block_size": BLOCK, "positions": torch.arange(3 * BLOCK), "first": first, "shape": (3, 2)}
    (one,) = chunks(q, **there)
    (other,) = chunks(q.roll(BLOCK, dims=1), **there)
    assert torch.equal(scored(one, means).roll(1, dims=1), scored(other, means))
