"""The composition matrix: every layout x schedule x mask x kernel x head grouping gives one rank's numbers."""

import itertools

import pytest
import torch

from longctx.attention import ContextParallelAttention
from longctx.kernels.mask import causal, documents
from longctx.parallel.layout import Layout
from longctx.parallel.loopback import run_ranks
from longctx.parallel.registry import SCHEDULES, resolve_schedule
from longctx.parallel.transport import ProcessGroupTransport
from tests.support.attention import (
    HEADS,
    LAYOUTS,
    MASKS,
    assert_equal,
    dense,
    make_mask,
    make_problem,
    sharded,
    together,
)
from tests.support.tolerance import assert_within_budget, max_error

TOKENS_PER_RANK = (7, 8)


def loopback(layout: Layout, problem, masks, *, schedule: str = "ring", kernel: str = "torch") -> list[torch.Tensor]:
    ranks = run_ranks(layout.cp, lambda t: sharded(t, layout, problem, masks, schedule=schedule, kernel=kernel))
    return together(layout, ranks)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cp", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("schedule", [name for name, schedule in SCHEDULES.items() if schedule.distributed])
def test_matrix(schedule, cp, layout, mask, heads):
    for n, kernel in itertools.product(TOKENS_PER_RANK, ("torch", "reference")):
        total = cp * n
        problem = make_problem(total, HEADS[heads], seed=total)
        masks = [make_mask(mask, total)]
        placed = Layout(LAYOUTS[layout][0], cp, LAYOUTS[layout][1])
        got = loopback(placed, problem, masks, schedule=schedule, kernel=kernel)
        assert_equal(got, dense(problem, masks), 1e-10)


@pytest.mark.parametrize("mask", MASKS)
def test_local_schedule(mask):
    problem, masks = make_problem(37, (4, 2)), [make_mask(mask, 37)]
    got = loopback(Layout("contiguous", 1), problem, masks, schedule="local")
    assert_equal(got, dense(problem, masks), 1e-10)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_of_a_batch_may_have_different_documents(layout):
    total = 4 * 9
    problem = make_problem(total, (4, 2), batch=3)
    masks = [causal(), causal() & documents((0, 5, 36)), causal() & documents((0, 11, 12, 30, 36))]
    got = loopback(Layout(LAYOUTS[layout][0], 4, LAYOUTS[layout][1]), problem, masks)
    assert_equal(got, dense(problem, masks), 1e-10)


@pytest.mark.parametrize("cp", [1, 2])
def test_inputs_may_be_any_view(cp):
    """q, k, v interleaved in one tensor (last stride 3), and dout permuted."""
    problem, layout, masks = make_problem(24, (4, 4)), Layout("striped", cp), [causal()]
    packed = torch.stack([problem.q, problem.k, problem.v], dim=-1)

    def rank(transport):
        attention = ContextParallelAttention(layout=layout, schedule=resolve_schedule("ring"), transport=transport)
        qkv = layout.shard(packed, rank=transport.rank, dim=1).requires_grad_()
        q, k, v = qkv.unbind(-1)
        dout = layout.shard(
            problem.dout.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0), rank=transport.rank, dim=1
        )
        out, lse = attention(q, k, v, plans=attention.plans(masks, total=24))
        (grad,) = torch.autograd.grad(out, qkv, dout.transpose(1, 3).contiguous().transpose(1, 3))
        return [out.detach(), lse, *grad.unbind(-1)]

    assert_equal(together(layout, run_ranks(cp, rank)), dense(problem, masks), 1e-10)


def one_token_per_rank_problem():
    return make_problem(4, (2, 1))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_token_per_rank(layout):
    problem, masks = one_token_per_rank_problem(), [causal() & documents((0, 1, 4))]
    got = loopback(Layout(LAYOUTS[layout][0], 4, LAYOUTS[layout][1]), problem, masks)
    assert_equal(got, dense(problem, masks), 1e-10)


def on_gloo(rank: int, world_size: int, group, cases):
    """Run all cases on real ranks; one call, since starting is what costs."""
    results = []
    for layout, mask, heads, n in cases:
        total = world_size * n
        problem = make_problem(total, HEADS[heads], batch=2, seed=total)
        masks = [make_mask(mask, total), causal()]
        transport = ProcessGroupTransport(group)
        placed = Layout(LAYOUTS[layout][0], world_size, LAYOUTS[layout][1])
        results.append(sharded(transport, placed, problem, masks, schedule="ring", kernel="torch"))
    return results


@pytest.mark.parametrize("world_size", [2, 4])
def test_matrix_on_gloo_ranks(gloo_pool, world_size):
    cases = list(itertools.product(LAYOUTS, ("causal", "window", "documents"), ("gqa", "mqa"), TOKENS_PER_RANK))
    ranks = gloo_pool.run(on_gloo, world_size, cases)
    for index, (layout, mask, heads, n) in enumerate(cases):
        total = world_size * n
        problem = make_problem(total, HEADS[heads], batch=2, seed=total)
        placed = Layout(LAYOUTS[layout][0], world_size, LAYOUTS[layout][1])
        got = together(placed, [rank[index] for rank in ranks])
        assert_equal(got, dense(problem, [make_mask(mask, total), causal()]), 1e-10)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("cp", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ring_hops_and_bytes_equal_the_formula(cp, kv_heads, dtype):
    """Forward cp - 1 hops of K/V; backward cp - 1 of K/V and cp of float32 dK/dV; nothing at cp = 1."""
    batch, n, head_dim = 2, 6, 8
    problem = make_problem(cp * n, (4, kv_heads), batch=batch, head_dim=head_dim).to(dtype)
    layout = Layout("striped", cp)

    def count(transport):
        sharded(transport, layout, problem, [causal()] * batch, schedule="ring", kernel="torch")
        return transport.traffic.hops, transport.traffic.bytes

    elements = 2 * batch * n * kv_heads * head_dim
    hops = 3 * cp - 2 if cp > 1 else 0
    sent = 2 * (cp - 1) * elements * dtype.itemsize + (cp if cp > 1 else 0) * elements * 4
    assert run_ranks(cp, count) == [(hops, sent)] * cp


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bfloat16_error_stays_within_twice_torchs_at_every_cp(layout):
    total = 8 * 48
    problem = make_problem(total, (4, 2), head_dim=16).to(torch.bfloat16)
    masks = [causal() & documents((0, 100, 101, 384))]
    truth, plain = dense(problem.to(torch.float64), masks), dense(problem, masks)
    for cp in (1, 2, 8):
        got = loopback(Layout(LAYOUTS[layout][0], cp, LAYOUTS[layout][1]), problem, masks)
        for name, ours, same, ref in zip(("out", "lse", "dq", "dk", "dv"), got, plain, truth, strict=True):
            assert_within_budget(ours, same, ref, factor=2.0 if name in ("out", "lse") else 3.0, name=f"{name} cp={cp}")


def test_float32_partials_keep_the_error_flat_in_cp():
    """With float32 all the way the error at cp=8 is that at cp=1, to a few per cent of the dtype's own error."""
    total = 8 * 64
    problem = make_problem(total, (4, 2), head_dim=16).to(torch.float32)
    truth = dense(problem.to(torch.float64), [causal()])
    errors = {
        cp: [
            (ours.double() - ref).norm().item()
            for ours, ref in zip(loopback(Layout("striped", cp), problem, [causal()]), truth, strict=True)
        ]
        for cp in (1, 8)
    }
    for one, eight in zip(errors[1], errors[8], strict=True):
        assert eight <= 1.5 * one


def test_two_runs_are_bitwise_equal():
    problem, masks = make_problem(8 * 7, (4, 2)).to(torch.float32), [causal()]
    first, second = (loopback(Layout("zigzag", 8), problem, masks) for _ in range(2))
    assert all(max_error(a, b) == 0 for a, b in zip(first, second, strict=True))


def test_lse_of_far_apart_scores_survives_every_hop():
    """Scores of +-200 in different shards: exponentials of either alone would overflow or vanish."""
    problem = make_problem(32, (2, 2))
    problem.k[:, ::4] *= 60.0
    masks = [causal()]
    for layout in LAYOUTS.values():
        got = loopback(Layout(layout[0], 4, layout[1]), problem, masks)
        assert_equal(got, dense(problem, masks), 1e-9)


def test_bad_calls_are_refused():
    def call(transport):
        with pytest.raises(ValueError, match="for cp=2, the transport's group has 1"):
            ContextParallelAttention(
                layout=Layout("striped", 2), schedule=resolve_schedule("ring"), transport=transport
            )
        attention = ContextParallelAttention(
            layout=Layout("striped", 1), schedule=resolve_schedule("ring"), transport=transport
        )
        plans = attention.plans([causal()], total=8)
        q = torch.zeros(3, 8, 4, 8)
        with pytest.raises(ValueError, match="one dtype"):
            attention(q, q.double(), q, plans=plans)
        with pytest.raises(ValueError, match=r"with T = \[8\] tokens, as planned; given \(3, 7, 4, 8\)"):
            attention(q[:, :7], q[:, :7], q[:, :7], plans=plans)
        with pytest.raises(ValueError, match="as planned"):
            attention(q, q, q[:, :, :2], plans=plans)
        with pytest.raises(ValueError, match="one plan or one per row; given 2 for a batch of 3"):
            attention(q, q, q, plans=[*plans, *plans])
        with pytest.raises(ValueError, match="multiple of num_kv_heads; given 4 and 3"):
            attention(q, q[:, :, :3], q[:, :, :3], plans=plans)

        with pytest.raises(ValueError, match="given 0 for a batch of 3"):
            attention(q, q, q, plans=[])
        other = ContextParallelAttention(
            layout=Layout("zigzag", 1), schedule=resolve_schedule("ring"), transport=transport
        )
        with pytest.raises(ValueError, match="the plans are rank 0's for .*striped.*; this is rank 0 with .*zigzag"):
            other(q, q, q, plans=plans)

    def call_two(transport):
        with pytest.raises(ValueError, match="attention.schedule=local keeps a sequence on one rank; the group has 2"):
            ContextParallelAttention(
                layout=Layout("contiguous", 2), schedule=resolve_schedule("local"), transport=transport
            )

    run_ranks(1, call)
    run_ranks(2, call_two)
    with pytest.raises(ValueError, match="attention.schedule=tree is not known; known are ring, local"):
        resolve_schedule("tree")
