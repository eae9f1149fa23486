"""What routers keep, against lists sorted in Python; what queries see of it, key by key."""

import pytest
import torch

from longctx.kernels.block_sparse.routing import steady
from longctx.kernels.block_sparse.routing.mosa import chunk_selection, expert_selection, kept, router_scores
from longctx.kernels.block_sparse.selection import allowed

DOCUMENTS = (13, 1, 7, 24, 2)
TOTAL = sum(DOCUMENTS)


def documents(*rows: tuple[int, ...]) -> torch.Tensor:
    starts = []
    for row in rows:
        begin = torch.tensor((0, *row[:-1])).cumsum(0)
        starts.append(begin.repeat_interleave(torch.tensor(row)))
    return torch.stack(starts)


def scores(*, equal: bool, batch: int = 2, heads: int = 3) -> torch.Tensor:
    draw = torch.randn(batch, TOTAL, heads, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    return draw.round() if equal else draw  # whole numbers: many equals


def best(values: list[float], count: int) -> set[int]:
    return set(sorted(range(len(values)), key=lambda place: (-values[place], place))[:count])


@pytest.mark.parametrize("equal", [False, True])
def test_kept_are_the_best_of_each_group(equal):
    group, draw = documents(DOCUMENTS), scores(equal=equal)
    quota = torch.full_like(group, 3)
    got = kept(draw, group=group, quota=quota)
    for row in range(2):
        for head in range(3):
            for begin in group[0].unique().tolist():
                places = (group[0] == begin).nonzero().flatten().tolist()
                chosen = best(draw[row, places, head].tolist(), 3)
                assert {place for place in range(len(places)) if got[row, places[place], head]} == chosen


@pytest.mark.parametrize("equal", [False, True])
@pytest.mark.parametrize("own", [slice(0, TOTAL), slice(1, TOTAL, 3)])
def test_chunks(equal, own):
    draw, document_of = scores(equal=equal), documents(DOCUMENTS, (TOTAL,))
    positions = torch.arange(TOTAL)[own]
    chosen = chunk_selection(
        draw,
        document_of=document_of,
        positions=positions,
        first=document_of[:, positions],
        chunk=6,
        keep=2,
        block_size=8,
    )
    seen = allowed(chosen, torch.arange(TOTAL))
    for row in range(2):
        for head in range(3):
            for at, query in enumerate(positions.tolist()):
                first = int(document_of[row, query])
                start = first + (query - first) // 6 * 6
                want = set(range(start, query + 1))
                for chunk in range(first, start, 6):
                    want |= {chunk + place for place in best(draw[row, chunk : chunk + 6, head].tolist(), 2)}
                assert set(seen[row, head, at].nonzero().flatten().tolist()) == want


@pytest.mark.parametrize("sparsity", [1, 4, 100])
def test_expert_choice(sparsity):
    draw, document_of = scores(equal=True), documents(DOCUMENTS)
    positions = torch.arange(0, TOTAL, 2)
    chosen = expert_selection(
        draw,
        document_of=document_of,
        positions=positions,
        first=document_of[:, positions],
        sparsity=sparsity,
        block_size=8,
    )
    seen = allowed(chosen, torch.arange(TOTAL))
    for row in range(2):
        for head in range(3):
            good = set()
            for begin, length in zip(document_of[0].unique().tolist(), DOCUMENTS, strict=True):
                part = draw[row, begin : begin + length, head].tolist()
                good |= {begin + place for place in best(part, -(-length // sparsity))}
            for at, query in enumerate(positions.tolist()):
                first = int(document_of[0, query])
                want = {key for key in good if first <= key <= query} if query in good else set()
                assert set(seen[row, head, at].nonzero().flatten().tolist()) == want


@pytest.mark.parametrize(("dim", "heads"), [(96, 1), (128, 2)])
def test_scores_have_the_same_bits_however_tokens_are_cut(dim, heads, monkeypatch):
    monkeypatch.setattr(steady, "AT_ONCE", 64 * dim)  # several steps
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(size, generator=generator) for size in ((2, 300, dim), (heads, dim)))
    whole = router_scores(x, weight)
    assert whole.dtype == torch.float32 and router_scores(x.double(), weight).dtype == torch.float64
    assert (whole - x.double() @ weight.double().T).abs().max() < 1e-5
    for ranks in (1, 2, 3, 8):
        for own in (*torch.arange(300).tensor_split(ranks), *(torch.arange(rank, 300, ranks) for rank in range(ranks))):
            assert torch.equal(router_scores(x[:, own], weight), whole[:, own])


def test_a_rank_without_tokens_selects_nothing():
    none, document_of = torch.arange(0), documents(DOCUMENTS)
    where = {"document_of": document_of, "positions": none, "first": document_of[:, none], "block_size": 8}
    assert router_scores(torch.zeros(2, 0, 4), torch.zeros(3, 4)).shape == (2, 0, 3)
    assert chunk_selection(scores(equal=False), chunk=6, keep=2, **where).lo.shape == (2, 0, 3, 2)
    assert expert_selection(scores(equal=False), sparsity=2, **where).lo.shape == (2, 0, 3, 1)
