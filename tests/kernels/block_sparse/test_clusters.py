"""Clusters against loops over pairs of tokens; the error of the centroids against its definition."""

import pytest
import torch

from longctx.kernels.block_sparse.routing.clusters import (
    cluster_selection,
    group_mean,
    kmeans_error,
    nearest,
    normalised,
)
from longctx.kernels.block_sparse.routing.steady import steady_scores
from longctx.kernels.block_sparse.selection import allowed

DOCUMENTS = (13, 1, 7, 24, 2)
TOTAL = sum(DOCUMENTS)
CLUSTERS = 3


def document_of() -> torch.Tensor:
    begin = torch.tensor((0, *DOCUMENTS[:-1])).cumsum(0)
    return begin.repeat_interleave(torch.tensor(DOCUMENTS))[None]


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_greatest_cosine_wins():
    x, centroids = draw(2, 70, 3, 8), draw(3, CLUSTERS, 8, seed=1)
    got = nearest(x, centroids)
    assert got.dtype == torch.int32
    for row in range(2):
        for token in range(70):
            for head in range(3):
                cosines = [float(x[row, token, head] @ c / c.norm()) for c in centroids[head]]
                assert got[row, token, head] == max(range(CLUSTERS), key=cosines.__getitem__)


def test_of_equal_centroids_the_first_and_zeros_are_no_nan():
    x = draw(1, 5, 1, 8)
    assert (nearest(x, torch.zeros(1, 4, 8, dtype=torch.float64)) == 0).all()
    assert (nearest(x, draw(1, 1, 8).expand(1, 4, 8)) == 0).all()


def test_normalised():
    x = draw(2, 5, 8)
    want = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    assert (normalised(x) - want).abs().max() < 1e-12
    assert normalised(x.bfloat16()).dtype == torch.float32


def test_the_error_and_its_gradient():
    x, centroids = draw(2, 9, 3, 8).requires_grad_(), draw(3, CLUSTERS, 8, seed=1).requires_grad_()
    cluster = nearest(x, centroids)
    error = kmeans_error(x, centroids, cluster)
    want, step = torch.zeros((), dtype=torch.float64), torch.zeros_like(centroids)
    for row in range(2):
        for token in range(9):
            for head in range(3):
                apart = centroids[head, cluster[row, token, head]] - x[row, token, head]
                want = want + apart.square().sum()
                step[head, cluster[row, token, head]] += 2 * apart.detach()
    assert (error - want).abs() < 1e-10
    dx, dc = torch.autograd.grad(error, (x, centroids), allow_unused=True)
    assert dx is None
    assert (dc - step).abs().max() < 1e-10


@pytest.mark.parametrize("window", [1, 3, 100])
@pytest.mark.parametrize("own", [slice(0, TOTAL), slice(1, TOTAL, 3)])
def test_the_latest_keys_of_the_cluster_and_the_own_one(window, own):
    generator = torch.Generator().manual_seed(2)
    q_cluster = torch.randint(CLUSTERS + 1, (2, TOTAL, 2), generator=generator)  # the last one has no keys
    k_cluster = torch.randint(CLUSTERS, (2, TOTAL, 2), generator=generator, dtype=torch.int32)
    positions, first = torch.arange(TOTAL)[own], document_of()[:, own]
    chosen = cluster_selection(
        q_cluster[:, own], k_cluster, positions=positions, first=first, window=window, block_size=8
    )
    seen = allowed(chosen, torch.arange(TOTAL))
    for row in range(2):
        for head in range(2):
            for at, query in enumerate(positions.tolist()):
                begin = int(first[0, at])
                same = [
                    key for key in range(begin, query + 1) if k_cluster[row, key, head] == q_cluster[row, query, head]
                ]
                assert set(seen[row, head, at].nonzero().flatten().tolist()) == {*same[-window:], query}
    empty = chosen.hi < chosen.lo
    assert empty[..., 0].any(), "a cluster without keys is an empty slot, not one that is searched in vain"


def test_the_same_however_tokens_are_cut():
    q, x, centroids = draw(2, 300, 6, 12).float(), draw(2, 300, 2, 12).float(), draw(2, 5, 12, seed=1).float()
    means, whole = group_mean(q, 2), nearest(x, centroids)
    cosines = steady_scores(x, centroids).float()
    for ranks in (1, 2, 3, 8):
        for own in (*torch.arange(300).tensor_split(ranks), *(torch.arange(rank, 300, ranks) for rank in range(ranks))):
            assert torch.equal(nearest(x[:, own], centroids), whole[:, own])
            assert torch.equal(steady_scores(x[:, own], centroids).float(), cosines[:, own])
            assert torch.equal(group_mean(q[:, own], 2), means[:, own])


def test_the_mean_of_query_heads():
    q = draw(2, 5, 6, 4)
    assert (group_mean(q, 2) - torch.stack([q[:, :, :3].mean(2), q[:, :, 3:].mean(2)], dim=2)).abs().max() < 1e-14
    assert group_mean(q.bfloat16(), 6).dtype == torch.float32


def test_a_rank_without_tokens_selects_nothing():
    none = torch.arange(0)
    assert nearest(torch.zeros(2, 0, 3, 8), torch.zeros(3, CLUSTERS, 8)).shape == (2, 0, 3)
    found = kmeans_error(torch.zeros(2, 0, 3, 8), torch.ones(3, CLUSTERS, 8), torch.zeros(2, 0, 3, dtype=torch.int32))
    assert found == 0
    keys = torch.zeros(2, TOTAL, 3, dtype=torch.int32)
    chosen = cluster_selection(
        keys[:, none], keys, positions=none, first=document_of()[:, none], window=3, block_size=8
    )
    assert chosen.lo.shape == (2, 0, 3, 2)
