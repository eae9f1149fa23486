"""SeerAttention's gate against the paper's, query by query, and what it learns from against the dense formula."""

import pytest
import torch

from longctx.kernels.block_sparse.blocks import blocks_of
from longctx.kernels.block_sparse.routing.distill import Teacher, gate_loss
from longctx.kernels.block_sparse.routing.seer import gate_keys, gate_queries, pooled, seer_blocks
from tests.kernels.block_sparse.routing_cases import (
    chosen_sets,
    documents,
    draw,
    seer_choice,
    seer_logits,
    seer_target,
    tokens_of,
)

BLOCK = 4
ROWS = ((13, 1, 7, 20, 2), (43,), (5, 3, 1, 1, 33))
TOTAL = 43
HEADS = [(2, 2), (4, 2), (3, 1)]


def all_blocks(document_of):
    total = document_of.shape[1]
    return blocks_of(torch.arange(-(-total // BLOCK)), block_size=BLOCK, total=total, document_of=document_of)


def test_pools_are_of_the_document_of_a_blocks_last_token():
    document_of = documents(*ROWS)
    k = draw(3, TOTAL, 2, 3, seed=1)
    got = pooled(k, all_blocks(document_of))
    for row in range(3):
        for block in range(11):
            last = min(block * BLOCK + BLOCK, TOTAL) - 1
            keys = k[row, tokens_of(block, BLOCK, int(document_of[row, last]), last)]
            want = torch.cat([keys.max(0).values, keys.min(0).values, keys.mean(0)], dim=-1)
            torch.testing.assert_close(got[row, block], want, rtol=0, atol=1e-12)


def gate(q, k, document_of, wq, wk):
    return gate_queries(q, wq, block_size=BLOCK), gate_keys(pooled(k, all_blocks(document_of)), wk)


def case(heads, *, scale=1.0):
    q, k = (scale * draw(3, TOTAL, count, 4, seed=seed) for seed, count in enumerate(heads))
    group = heads[0] // heads[1]
    wq, wk = draw(heads[1], group * 4, 6, seed=3), draw(heads[1], 12, 6, seed=4)
    return q, k, wq, wk


def each_query(q, k, document_of):
    """Yield row, t, KV head, the group's queries `[G, T, D]`, the head's keys and where the document starts."""
    kv_heads = k.shape[2]
    for row in range(len(q)):
        for t in range(TOTAL):
            for head in range(kv_heads):
                of_group = q[row].unflatten(1, (kv_heads, -1))[:, head].transpose(0, 1)
                yield row, t, head, of_group, k[row, :, head], int(document_of[row, t])


@pytest.mark.parametrize(("topk", "threshold"), [(1, None), (3, None), (4, 0.3), (20, None), (20, 0.05)])
@pytest.mark.parametrize("heads", HEADS)
def test_choice(topk, threshold, heads):
    document_of = documents(*ROWS)
    q, k, wq, wk = case(heads, scale=0.3)
    got = seer_blocks(
        *gate(q, k, document_of, wq, wk),
        blocks=all_blocks(document_of),
        positions=torch.arange(TOTAL),
        first=document_of,
        topk=topk,
        threshold=threshold,
    )
    assert got.shape == (3, TOTAL, heads[1], min(topk - 1, 11) + 1)
    found = chosen_sets(got)
    for row, t, head, of_group, keys, start in each_query(q, k, document_of):
        logits = seer_logits(of_group, keys, wq[head], wk[head], t, start, size=BLOCK, theta=None)
        assert found[row][t][head] == sorted(seer_choice(logits, t, size=BLOCK, topk=topk, threshold=threshold))
    if threshold == 0.05:  # a threshold that drops some and not all
        sizes = {len(blocks) for row in found for heads in row for blocks in heads}
        assert len(sizes) > 3


def test_gate_queries_are_the_same_bits_whoever_has_the_blocks():
    q, _, wq, _ = case((4, 2))
    q, wq = q.float(), wq.float()
    whole = gate_queries(q, wq, block_size=BLOCK)
    for block in range(11):
        tokens = slice(block * BLOCK, (block + 1) * BLOCK)
        assert torch.equal(gate_queries(q[:, tokens], wq, block_size=BLOCK), whole[:, tokens])


def teacher_options(kind, heads):
    return {
        "plain": {},
        "sinks": {"sink_logits": 2 * draw(heads, seed=9)},
        "softcap": {"softcap": 0.8},
    }[kind]


def naive_loss(q, k, wq, wk, document_of, *, sink_logits=None, softcap=None):
    total = torch.zeros((), dtype=torch.float64)
    group = q.shape[2] // k.shape[2]
    for _, t, head, of_group, keys, start in each_query(q, k, document_of):
        logits = seer_logits(of_group, keys, wq[head], wk[head], t, start, size=BLOCK, theta=None)
        if not logits:
            continue
        sinks = None if sink_logits is None else sink_logits[head * group : (head + 1) * group]
        target = seer_target(of_group, keys, t, start, size=BLOCK, softcap=softcap, sinks=sinks)
        given = torch.softmax(torch.stack(list(logits.values())), dim=0)
        total = total + (target * (target.log() - given.log())).sum()
    return total / k.shape[2]


@pytest.mark.parametrize("kind", ["plain", "sinks", "softcap"])
@pytest.mark.parametrize("heads", HEADS)
def test_loss_and_its_gradient(kind, heads):
    document_of = documents(*ROWS)
    q, k, wq, wk = case(heads)
    weights = (wq.requires_grad_(), wk.requires_grad_())
    options = teacher_options(kind, heads[0])
    want = naive_loss(q, k, wq, wk, document_of, **options)
    dwant = torch.autograd.grad(want, weights)
    for scores in (1, 1000, 1 << 24):
        got = gate_loss(
            *gate(q, k, document_of, wq, wk),
            teacher=Teacher(q=q, keys=k, document_of=document_of, **options),
            blocks=all_blocks(document_of),
            positions=torch.arange(TOTAL),
            first=document_of,
            scores=scores,
        )
        torch.testing.assert_close(got, want, rtol=1e-10, atol=0)
        for ours, theirs in zip(torch.autograd.grad(3 * got, weights), dwant, strict=True):
            torch.testing.assert_close(ours, 3 * theirs, rtol=0, atol=1e-10 * float(theirs.abs().max()))


def test_losses_of_ranks_add_up():
    """Ranks of some blocks each, in any order: their losses and gradients sum to those of one rank."""
    document_of = documents(*ROWS)
    q, k, wq, wk = case((4, 2))
    gate_q, gate_k = (x.requires_grad_() for x in gate(q, k, document_of, wq, wk))

    def part(some):
        cut = torch.arange(TOTAL).split(BLOCK)
        tokens = torch.cat([torch.arange(0), *(cut[block] for block in some)])
        return gate_loss(
            gate_q[:, tokens],
            gate_k,
            teacher=Teacher(q=q[:, tokens], keys=k, document_of=document_of),
            blocks=all_blocks(document_of),
            positions=tokens,
            first=document_of[:, tokens],
            scores=3000,
        )

    whole = part(range(11))
    parts = sum(part(some) for some in ([0, 7, 10], [], [3, 4], [1, 2, 5, 6, 8, 9]))
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=0)
    for ours, theirs in zip(*(torch.autograd.grad(x, (gate_q, gate_k)) for x in (parts, whole)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_a_target_that_underflows():
    """Past blocks 2,000 below the own one: probabilities are 0, the target is not NaN and still the right one."""
    k = torch.zeros(1, 12, 1, 2, dtype=torch.float64)
    k[0, :4, 0, 0], k[0, 8:, 0, 0] = 1.0, 3000.0
    q = torch.tensor([1.0, 0.0], dtype=torch.float64).expand(1, 12, 1, 2)
    gate_q, gate_k = (torch.zeros(1, n, 1, 2, dtype=torch.float64, requires_grad=True) for n in (12, 3))
    document_of = documents((12,))
    loss = gate_loss(
        gate_q,
        gate_k,
        teacher=Teacher(q=q, keys=k, document_of=document_of),
        blocks=all_blocks(document_of),
        positions=torch.arange(12),
        first=document_of,
    )
    target = torch.softmax(torch.tensor([2**-0.5, 0.0], dtype=torch.float64), dim=0)
    torch.testing.assert_close(loss, 4 * (target * (target / 0.5).log()).sum())
