"""Every kind of linear attention x state passing x layout gives one device's numbers, every rank's gradients too."""

import itertools
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from longctx.kernels.linear.op import linear_attention
from longctx.linear_attention import ContextParallelLinearAttention
from longctx.parallel.layout import Layout
from longctx.parallel.loopback import run_ranks
from longctx.parallel.state_passing import resolve_passing
from longctx.parallel.transport import Alone, ProcessGroupTransport
from tests.support.linear import (
    GATES,
    LAYOUTS,
    PASSINGS,
    RULES,
    assert_parts,
    in_other_dtype,
    make_problem,
    sharded,
    whole,
)
from tests.support.pairs import covering

FACTORS = {
    "gate": GATES,
    "rule": RULES,
    "passing": PASSINGS,
    "layout": tuple(LAYOUTS),
    "cp": (2, 3, 4, 8),
    "tokens": (7, 8),
    "packed": (False, True),
    "initial": (False, True),
    "kernel": ("torch", "reference"),
}


def bounds_of(total):
    """Return documents of one token, of less than a chunk, and longer than a rank's shard."""
    return (0, 1, 4, total // 2 + 2, total - 2, total)


def problem_of(case):
    total = case["cp"] * case["tokens"]
    bounds = bounds_of(total) if case["packed"] else None
    return make_problem(total, gate=case["gate"], rule=case["rule"], bounds=bounds, initial=case["initial"], seed=total)


def layout_of(case):
    name, width = LAYOUTS[case["layout"]]
    return Layout(name, case["cp"], width)


def check(case):
    problem, layout = problem_of(case), layout_of(case)
    chunk = 4 if case["kernel"] == "torch" else None
    ranks = run_ranks(
        case["cp"],
        lambda t: sharded(t, layout, problem, passing=case["passing"], kernel=case["kernel"], chunk_size=chunk),
    )
    assert_parts(layout, ranks, whole(problem, kernel="reference"), 1e-11)


def name(case):
    return "-".join(f"{key}{value}" if isinstance(value, int) else value for key, value in case.items())


@pytest.mark.parametrize("case", covering(FACTORS), ids=name)
def test_every_pair_of_factors(case):
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("cp", FACTORS["cp"])
@pytest.mark.parametrize("layout", FACTORS["layout"])
@pytest.mark.parametrize("passing", PASSINGS)
def test_whole_product(cp, layout, passing):
    for gate, rule, tokens, packed in itertools.product(GATES, RULES, (7, 8), (False, True)):
        case = {"cp": cp, "layout": layout, "passing": passing, "gate": gate, "rule": rule, "tokens": tokens}
        check({**case, "packed": packed, "initial": packed, "kernel": "torch"})


def on_gloo(rank, world_size, group, cases):
    """Run cases on a real rank."""
    results = []
    for case in cases:
        transport, problem = ProcessGroupTransport(group), problem_of(case)
        results.append(sharded(transport, layout_of(case), problem, passing=case["passing"], kernel="torch"))
    return results


@pytest.mark.parametrize("world_size", [2, 4])
def test_on_real_ranks(gloo_pool, world_size):
    cases = covering({**FACTORS, "cp": (world_size,), "kernel": ("torch",)})
    ranks = gloo_pool.run(on_gloo, world_size, cases)
    for index, case in enumerate(cases):
        want = whole(problem_of(case), kernel="reference")
        assert_parts(layout_of(case), [results[index] for results in ranks], want, 1e-11)


def test_a_batch_with_documents_of_its_own_per_row():
    layout, total = Layout("zigzag", 3), 24
    problem = make_problem(total, gate="scalar", rule="delta", bounds=None, initial=False)
    rows = [(0, 5, 6, 24), (0, 13, 24)]

    def run(transport):
        attention = ContextParallelLinearAttention(
            layout=layout, passing=resolve_passing("ring"), transport=transport, kernel="torch"
        )
        parts = {n: layout.shard(x, rank=transport.rank, dim=1) for n, x in problem.inputs.items()}
        return attention(**parts, plan=attention.plan(rows, total=total, device=torch.device("cpu")))

    got = layout.unshard(run_ranks(3, run), dim=1)
    for row, bounds in enumerate(rows):
        alone = {n: getattr(problem, n)[row : row + 1] for n in ("q", "k", "v", "g", "beta", "dout", "dfinal")}
        want = whole(type(problem)(**alone, initial=None, bounds=bounds), kernel="reference")
        torch.testing.assert_close(got[row : row + 1], want["out"], rtol=0, atol=1e-12)


@pytest.mark.parametrize(("gate", "rule"), list(itertools.product(GATES, RULES)))
def test_float32_error_does_not_grow_with_cp(gate, rule):
    """RMS error of all outputs and gradients at cp=8, against float64, at most 10 % over that of one rank."""
    errors = {1: 0.0, 8: 0.0}
    for seed in range(3):
        exact = make_problem(512, gate=gate, rule=rule, bounds=None, initial=False, key_dim=16, value_dim=16, seed=seed)
        if exact.g is not None:
            exact = type(exact)(**{**vars(exact), "g": exact.g * 0.05})
        single = in_other_dtype(exact, torch.float32)
        want = whole(in_other_dtype(single, torch.float64), kernel="torch")
        for cp in errors:
            layout = Layout("contiguous", cp)
            run = partial(sharded, layout=layout, problem=single, passing="all_gather", kernel="torch")
            parts = run_ranks(cp, run)
            for key in ("out", "dq", "dk", "dv"):
                got = layout.unshard([part[key] for part in parts], dim=1).double()
                errors[cp] += ((got - want[key]).square().sum() / want[key].square().sum()).item()
    assert errors[8] <= 1.1**2 * errors[1], errors


def test_refusals():
    with pytest.raises(ValueError, match="cp=2"):
        ContextParallelLinearAttention(layout=Layout("zigzag", 2), passing=resolve_passing("ring"), transport=Alone())
    attention = ContextParallelLinearAttention(
        layout=Layout("contiguous", 1), passing=resolve_passing("ring"), transport=Alone()
    )
    problem = make_problem(8, gate="none", rule="sum", bounds=None, initial=False)
    plan = attention.plan(None, total=9, device=torch.device("cpu"))
    with pytest.raises(ValueError, match="T = 9"):
        attention(problem.q, problem.k, problem.v, plan=plan)
    plan = attention.plan([(0, 8), (0, 3, 8), (0, 8)], total=8, device=torch.device("cpu"))
    with pytest.raises(ValueError, match="given 3 for a batch of 2"):
        attention(problem.q, problem.k, problem.v, plan=plan)
    with pytest.raises(ValueError, match="initial_state must be"):
        attention(
            problem.q,
            problem.k,
            problem.v,
            plan=attention.plan(None, total=8, device=torch.device("cpu")),
            initial_state=torch.zeros(2, 2, 3, 4),
        )


def test_a_trained_initial_state_with_all_else_frozen():
    """All ranks take part in the backward though only the first one's outputs show the state directly."""
    layout, total = Layout("contiguous", 3), 12
    problem = make_problem(total, gate="scalar", rule="delta", bounds=None, initial=True)

    def run(transport):
        attention = ContextParallelLinearAttention(
            layout=layout, passing=resolve_passing("ring"), transport=transport, kernel="torch"
        )
        part = partial(layout.shard, rank=transport.rank, dim=1)
        initial = problem.initial.clone().requires_grad_()
        out = attention(
            part(problem.q),
            part(problem.k),
            part(problem.v),
            g=part(problem.g),
            beta=part(problem.beta),
            initial_state=initial,
            plan=attention.plan(None, total=total, device=torch.device("cpu")),
        )
        (out * part(problem.dout)).sum().backward()
        return initial.grad

    initial = problem.initial.clone().requires_grad_()
    inputs = {name: tensor for name, tensor in problem.inputs.items() if name != "initial"}
    out, _ = linear_attention(**inputs, initial_state=initial, kernel="reference")
    (out * problem.dout).sum().backward()
    torch.testing.assert_close(sum(run_ranks(3, run)), initial.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("rule", RULES)
def test_under_activation_checkpointing(gate, rule):
    """The forward runs again in the backward, exchanges of states included, and gives the same gradients."""
    layout, total = Layout("zigzag", 2), 12
    problem = make_problem(total, gate=gate, rule=rule, bounds=(0, 5, 12), initial=False)

    def run(transport, *, again):
        attention = ContextParallelLinearAttention(
            layout=layout, passing=resolve_passing("all_gather"), transport=transport, kernel="torch"
        )
        plan = attention.plan([problem.bounds], total=total, device=torch.device("cpu"))
        leaves = {
            n: (x if n == "g" and gate == "fixed" else layout.shard(x, rank=transport.rank, dim=1)).clone()
            for n, x in problem.inputs.items()
        }
        for leaf in leaves.values():
            leaf.requires_grad_()

        def attend(q, k, v):
            return attention(q, k, v, g=leaves.get("g"), beta=leaves.get("beta"), plan=plan, chunk_size=4)

        qkv = (leaves["q"], leaves["k"], leaves["v"])
        out = checkpoint(attend, *qkv, use_reentrant=False) if again else attend(*qkv)
        out.square().sum().backward()
        return [leaf.grad for leaf in leaves.values()]

    once, twice = (run_ranks(2, partial(run, again=again)) for again in (False, True))
    for a, b in zip(once, twice, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_autocast_changes_nothing():
    problem = in_other_dtype(
        make_problem(40, gate="scalar", rule="delta", bounds=None, initial=True, seed=5), torch.float32
    )
    want = whole(problem, kernel="torch")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = whole(problem, kernel="torch")
        parts = run_ranks(1, lambda t: sharded(t, Layout("zigzag", 1), problem, passing="ring", kernel="torch"))[0]
    for name, expected in want.items():
        assert torch.equal(got[name], expected) and torch.equal(parts[name], expected), name


def test_a_plan_of_another_rank_or_layout_is_refused_and_bounds_are_kept():
    layout = Layout("contiguous", 1)
    attention = ContextParallelLinearAttention(layout=layout, passing=resolve_passing("ring"), transport=Alone())
    other = ContextParallelLinearAttention(
        layout=Layout("zigzag", 1), passing=resolve_passing("ring"), transport=Alone()
    )
    x, weight, device = torch.randn(1, 8, 2), torch.randn(2, 3), torch.device("cpu")
    with pytest.raises(ValueError, match="make it with this object's `plan`"):
        attention.convolve(x, weight, plan=other.plan(None, total=8, device=device))
    with pytest.raises(ValueError, match="T = 9"):
        attention.convolve(x, weight, plan=attention.plan(None, total=9, device=device))
    row = [0, 3, 8]
    plan = attention.plan([row], total=8, device=device)
    want = attention.convolve(x, weight, plan=attention.plan([(0, 3, 8)], total=8, device=device))
    row[1] = 5
    assert torch.equal(attention.convolve(x, weight, plan=plan), want)
    with pytest.raises(ValueError, match="must be <= 0"):
        attention(*torch.randn(3, 1, 8, 1, 2), g=torch.ones(1), plan=plan)
