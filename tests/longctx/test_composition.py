"""The composition matrix: every layout x schedule x mask x kernel x head grouping gives one rank's numbers."""

import itertools

import pytest
import torch

from longctx.kernels.mask import causal, documents
from longctx.parallel.layout import Layout
from longctx.parallel.loopback import run_ranks
from longctx.parallel.schedules.ring import DoubleRing
from longctx.parallel.transport import ProcessGroupTransport
from tests.support.attention import (
    HEADS,
    LAYOUTS,
    MASKS,
    SCHEDULES,
    SCORES,
    arranged,
    assert_equal,
    dense,
    make_heads,
    make_mask,
    make_problem,
    make_schedule,
    sharded,
    together,
)
from tests.support.pairs import covering
from tests.support.tolerance import assert_within_budget

CPS = (2, 3, 4, 8)


def place(layout: str, cp: int) -> Layout:
    return Layout(LAYOUTS[layout][0], cp, LAYOUTS[layout][1])


def check(*, cp, layout, schedule, mask, heads, scores, tokens, kernel="auto", v_head_dim=None, batch=1):
    total, counts = cp * tokens, make_heads(heads, cp)
    problem = make_problem(total, counts, v_head_dim=v_head_dim, batch=batch, seed=total)
    masks = [make_mask(mask, total, heads=counts[0])]
    placed, way = place(layout, cp), make_schedule(schedule, cp)
    ranks = run_ranks(cp, lambda t: sharded(t, placed, problem, masks, schedule=way, kernel=kernel, scores=scores))
    assert_equal(together(placed, ranks), dense(problem, masks, scores=scores), 1e-10)


def name(case) -> str:
    tokens = case["cp"] * case["tokens"]
    return "-".join(
        [
            case["layout"],
            arranged(case["schedule"], case["cp"]),
            case["mask"],
            case["heads"],
            f"cp{case['cp']}",
            f"T{tokens}",
        ]
    )


def legal(case) -> bool:
    """Only the reference kernel evaluates predicates; it is slow, so it has nothing else to do with many ranks."""
    return case.get("kernel") != "torch" or case.get("mask") != "predicate"


PAIRS = covering(
    {
        "mask": MASKS,
        "schedule": SCHEDULES,
        "layout": tuple(LAYOUTS),
        "cp": CPS,
        "heads": HEADS,
        "scores": SCORES,
        "tokens": (7, 8),
        "kernel": ("torch", "reference"),
    },
    legal=legal,
)


@pytest.mark.parametrize("case", PAIRS, ids=[f"{name(case)}-{case['scores']}-{case['kernel']}" for case in PAIRS])
def test_every_pair_of_factors(case):
    check(**case)


@pytest.mark.slow
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("cp", CPS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_whole_product(layout, cp, schedule, mask, heads):
    tokens = 7 + (cp + len(mask) + len(heads)) % 2  # odd shards in half of the cases
    check(cp=cp, layout=layout, schedule=schedule, mask=mask, heads=heads, scores="sink", tokens=tokens)


FEW = {
    "tokens": (1, 2, 3),
    "schedule": SCHEDULES,
    "layout": tuple(LAYOUTS),
    "mask": ("causal", "documents", "window", "sinks_window"),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_hardly_any_tokens(schedule):
    for case in covering(FEW):
        if case["schedule"] == schedule:
            check(cp=4, heads="gqa", scores="sink", **case)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("tokens", FEW["tokens"])
def test_hardly_any_tokens_whole_product(tokens, schedule):
    for layout, mask in itertools.product(FEW["layout"], FEW["mask"]):
        check(cp=4, layout=layout, schedule=schedule, mask=mask, heads="gqa", scores="sink", tokens=tokens)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_head_dims_of_q_and_v_may_differ(schedule):
    for cp in (2, 3):
        check(
            cp=cp,
            layout="zigzag",
            schedule=schedule,
            mask="documents",
            heads="gqa",
            scores="plain",
            tokens=9,
            v_head_dim=5,
            batch=2,
        )


@pytest.mark.parametrize("mask", MASKS)
def test_local_schedule(mask):
    problem, masks = make_problem(37, (4, 2)), [make_mask(mask, 37)]
    layout = Layout("contiguous", 1)
    ranks = run_ranks(1, lambda t: sharded(t, layout, problem, masks, schedule="local", kernel="auto"))
    assert_equal(together(layout, ranks), dense(problem, masks), 1e-10)


@pytest.mark.parametrize("kind", ["double_ring", "double_burst"])
@pytest.mark.parametrize("cp", [6, 8])
def test_packed_documents_on_many_inner_rings(cp, kind):
    """Three and four inner rings of two: shards skip rings, and arrive for different times with one exchange."""
    way = DoubleRing(ranks_per_ring=2, backward_moves="rotate_kv" if kind == "double_ring" else "rotate_q")
    generator = torch.Generator().manual_seed(cp)
    total = cp * 6
    problem = make_problem(total, (4, 2))
    for draw in range(8):
        inner = torch.randperm(total - 1, generator=generator)[: 2 + draw // 2] + 1
        masks = [causal() & documents((0, *sorted(inner.tolist()), total))]
        placed = place(tuple(LAYOUTS)[draw % 4], cp)
        ranks = run_ranks(cp, lambda t: sharded(t, placed, problem, masks, schedule=way, kernel="torch", scores="sink"))  # noqa: B023
        assert_equal(together(placed, ranks), dense(problem, masks, scores="sink"), 1e-10)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_of_a_batch_may_have_different_masks(layout, schedule):
    """K/V of all rows travel together, so a row may get keys that only another one needs."""
    total, placed = 4 * 9, place(layout, 4)
    problem = make_problem(total, (4, 2), batch=3)
    masks = [causal(), causal() & documents((0, 5, 36)), make_mask("per_head", total, heads=4)]
    way = make_schedule(schedule, 4)
    ranks = run_ranks(4, lambda t: sharded(t, placed, problem, masks, schedule=way, kernel="torch", scores="sink"))
    assert_equal(together(placed, ranks), dense(problem, masks, scores="sink"), 1e-10)


def on_gloo(rank: int, world_size: int, group, cases):
    """Run all cases on real ranks; one call, since starting is what costs."""
    results, transport = [], ProcessGroupTransport(group)
    for case in cases:
        total, counts = world_size * case["tokens"], make_heads(case["heads"], world_size)
        problem = make_problem(total, counts, batch=2, seed=total)
        masks = [make_mask(case["mask"], total, heads=counts[0]), causal()]
        way = make_schedule(case["schedule"], world_size)
        placed = place(case["layout"], world_size)
        results.append(sharded(transport, placed, problem, masks, schedule=way, kernel="auto", scores="sink"))
    return results


@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.slow), 4])
def test_matrix_on_gloo_ranks(gloo_pool, world_size):
    cases = covering(
        {
            "mask": ("causal", "window", "documents", "prefix", "documents_sinks_window", "per_head"),
            "schedule": SCHEDULES,
            "layout": tuple(LAYOUTS),
            "heads": HEADS,
            "tokens": (7, 8),
        }
    )
    ranks = gloo_pool.run(on_gloo, world_size, cases)
    for index, case in enumerate(cases):
        total, counts = world_size * case["tokens"], make_heads(case["heads"], world_size)
        problem = make_problem(total, counts, batch=2, seed=total)
        masks = [make_mask(case["mask"], total, heads=counts[0]), causal()]
        got = together(place(case["layout"], world_size), [rank[index] for rank in ranks])
        assert_equal(got, dense(problem, masks, scores="sink"), 1e-10)


@pytest.fixture(scope="module")
def in_bfloat16():
    """Return a problem, its mask, and what dense attention makes of it in float64 and in bfloat16."""
    problem = make_problem(8 * 32, (8, 2), head_dim=16).to(torch.bfloat16)
    masks = [causal() & documents((0, 100, 101, 256))]
    truth, plain = dense(problem.to(torch.float64), masks, scores="sink"), dense(problem, masks, scores="sink")
    return problem, masks, truth, plain


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_bfloat16_error_stays_within_twice_torchs(in_bfloat16, layout, schedule):
    problem, masks, truth, plain = in_bfloat16
    placed, way = place(layout, 8), make_schedule(schedule, 8)
    ranks = run_ranks(8, lambda t: sharded(t, placed, problem, masks, schedule=way, kernel="torch", scores="sink"))
    for label, ours, same, ref in zip(
        ("out", "lse", "dq", "dk", "dv"), together(placed, ranks)[:5], plain[:5], truth[:5], strict=True
    ):
        assert_within_budget(ours, same, ref, factor=2.0 if label in ("out", "lse") else 3.0, name=label)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_float32_partials_keep_the_error_flat_in_cp(schedule):
    """With float32 all the way the error at cp=8 is that at cp=1, to a few per cent of the dtype's own error."""
    problem = make_problem(8 * 64, (8, 2), head_dim=16).to(torch.float32)
    truth = dense(problem.to(torch.float64), [causal()])
    errors = {}
    for cp, way in ((1, make_schedule("ring", 1)), (8, make_schedule(schedule, 8))):
        layout = Layout("striped", cp)
        ranks = run_ranks(cp, lambda t: sharded(t, layout, problem, [causal()], schedule=way, kernel="torch"))  # noqa: B023
        pairs = zip(together(layout, ranks)[:5], truth[:5], strict=True)
        errors[cp] = [(ours.double() - ref).norm().item() for ours, ref in pairs]
    for one, eight in zip(errors[1], errors[8], strict=True):
        assert eight <= 1.5 * one


def test_lse_of_far_apart_scores_survives_every_hop():
    """Scores of +-200 in different shards: exponentials of either alone would overflow or vanish."""
    problem = make_problem(32, (4, 4))
    problem.k[:, ::4] *= 60.0
    for layout, schedule in itertools.product(LAYOUTS, SCHEDULES):
        placed, way = place(layout, 4), make_schedule(schedule, 4)
        ranks = run_ranks(4, lambda t: sharded(t, placed, problem, [causal()], schedule=way, kernel="torch"))  # noqa: B023
        assert_equal(together(placed, ranks), dense(problem, [causal()]), 1e-9)


def test_a_sink_alone_takes_rows_that_see_nothing():
    """Where a mask hides everything, lse is the sink logit, out 0, and no gradient flows."""
    total, layout = 24, Layout("striped", 2)
    problem = make_problem(total, (4, 2))
    masks = [make_mask("prefix_per_document", total) & make_mask("predicate", total)]
    ranks = run_ranks(2, lambda t: sharded(t, layout, problem, masks, schedule="ring", kernel="auto", scores="sink"))
    got = together(layout, ranks)
    assert_equal(got, dense(problem, masks, scores="sink"), 1e-10)
    blind = ~masks[0].allowed(torch.arange(total), torch.arange(total)).any(-1)
    assert blind.any() and (got[0][:, blind] == 0).all()
    assert torch.equal(got[1][:, :, blind], problem.sink_logits[None, :, None].expand_as(got[1][:, :, blind]))
    problem.sink_logits[1] = float("-inf")  # no sink at all for this head
    ranks = run_ranks(2, lambda t: sharded(t, layout, problem, masks, schedule="ring", kernel="auto", scores="sink"))
    for x in together(layout, ranks):
        assert not x.isnan().any()
    assert (together(layout, ranks)[0][:, :, 1] - dense(problem, masks)[0][:, :, 1]).abs().max() < 1e-10
