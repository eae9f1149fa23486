"""Selected attention over ranks: every layout x schedule x way of moving K/V x weights gives one rank's numbers."""

import pytest
import torch

from longctx.kernels.block_sparse.reference import selected_attention, selected_sum
from longctx.parallel.layout import Layout
from longctx.parallel.loopback import run_ranks
from longctx.parallel.transport import ProcessGroupTransport
from longctx.sparse_attention import ContextParallelSparseAttention
from longctx.sparse_moves import MOVES
from tests.support.attention import SCHEDULES, make_heads, make_problem, make_schedule
from tests.support.pairs import covering
from tests.support.selections import BLOCK, document_starts, nothing, random_blocks, random_classes, two_parts

CPS = (2, 3, 4, 8)
WHOLE = ("contiguous", "zigzag", "striped4", "striped8")  # layouts that keep blocks whole
LAYOUTS = {
    **{name: (name, 1) for name in ("contiguous", "zigzag", "striped")},
    "striped4": ("striped", 4),
    "striped8": ("striped", 8),
}
KINDS = ("blocks", "gated", "sum", "classes", "two_parts", "two_parts_sum", "nothing")


def make_selection(kind, positions, document_of, *, heads, kv_heads, alike):
    count = kv_heads if alike else heads
    if kind == "classes":
        return random_classes(positions, document_of, heads=count)
    if kind.startswith("two_parts"):
        return two_parts(positions, document_of, heads=count, beside_heads=kv_heads)
    if kind == "nothing":
        return nothing(positions, document_of, heads=count)
    return random_blocks(positions, document_of, heads=count, slots=4)


def bounds_of(total, documents):
    cuts = {0, total}
    if documents:
        cuts |= {1, 2, total // 3 + 1, total - 3}
    return tuple(sorted(cuts))


def weights_of(kind):
    return {"gated": "gated", "sum": "sum", "two_parts_sum": "sum"}.get(kind, "softmax")


def gates_for(problem, slots):
    generator = torch.Generator().manual_seed(7)
    return torch.randn(*problem.q.shape[:3], slots, generator=generator, dtype=torch.float64)


def on_rank(transport, case, problem, bounds):
    layout = Layout(LAYOUTS[case["layout"]][0], transport.size, LAYOUTS[case["layout"]][1])
    attention = ContextParallelSparseAttention(
        layout=layout,
        schedule=make_schedule(case["schedule"], transport.size),
        transport=transport,
        kernel=case.get("kernel", "torch"),
        moves=case["moves"],
    )
    total = problem.q.shape[1]
    plan = attention.plan(bounds, total=total, device=torch.device("cpu"))
    shards = [layout.shard(x, rank=transport.rank, dim=1) for x in (problem.q, problem.k, problem.v, problem.dout)]
    q, k, v = (x.requires_grad_() for x in shards[:3])
    sink = problem.sink_logits.clone().requires_grad_()
    heads = {"heads": q.shape[2], "kv_heads": k.shape[2], "alike": case["alike"]}
    selection = make_selection(case["kind"], layout.positions(transport.rank, total), plan.document_of, **heads)
    kind, gates = weights_of(case["kind"]), None
    if kind == "gated":
        whole = gates_for(problem, selection.slots)
        gates = layout.shard(whole, rank=transport.rank, dim=1).requires_grad_()
    seen = []
    out = attention(
        q,
        k,
        v,
        selection=selection,
        plan=plan,
        gates=gates,
        weights=kind,
        softcap=2.0 if case["softcap"] and kind != "sum" else None,
        sink_logits=None if kind == "sum" else sink,
        observe=seen.append if case.get("observe") else None,
    )
    wanted = (q, k, v, sink, *(() if gates is None else (gates,)))
    grads = torch.autograd.grad(out, wanted, shards[3], allow_unused=True, materialize_grads=True)
    return layout, [out.detach(), *grads], seen


def one_rank(case, problem, bounds):
    total = problem.q.shape[1]
    rows = []
    document_of = torch.stack([document_starts(each) for each in bounds])
    q, k, v = (x.clone().requires_grad_() for x in (problem.q, problem.k, problem.v))
    sink = problem.sink_logits.clone().requires_grad_()
    heads = {"heads": q.shape[2], "kv_heads": k.shape[2], "alike": case["alike"]}
    selection = make_selection(case["kind"], torch.arange(total), document_of, **heads)
    kind, gates = weights_of(case["kind"]), None
    if kind == "gated":
        gates = gates_for(problem, selection.slots).requires_grad_()
    if kind == "sum":
        out = selected_sum(q, k, v, selection=selection, k_positions=torch.arange(total))
    else:
        out, _ = selected_attention(
            q,
            k,
            v,
            selection=selection,
            k_positions=torch.arange(total),
            gates=gates,
            softcap=2.0 if case["softcap"] else None,
            sink_logits=sink,
        )
    wanted = (q, k, v, sink, *(() if gates is None else (gates,)))
    rows = torch.autograd.grad(out, wanted, problem.dout, allow_unused=True, materialize_grads=True)
    return [out.detach(), *rows]


def together(ranks):
    layout = ranks[0][0]
    parts = [rank[1] for rank in ranks]
    whole = [layout.unshard([part[i] for part in parts], dim=1) for i in range(4)]
    whole.append(sum(part[4] for part in parts))
    return whole + [layout.unshard([part[i] for part in parts], dim=1) for i in range(5, len(parts[0]))]


def legal(case):
    if case.get("kind") == "gated" and case.get("layout", "zigzag") not in WHOLE:
        return False
    return not (case.get("kernel") == "reference" and case.get("cp", 2) > 3)


def problem_of(case, cp):
    total = cp * 2 * BLOCK * 2 if case["layout"] != "striped" else cp * 11
    return make_problem(total, make_heads(case["heads"], cp), batch=2, seed=total)


def rows_of(total, documents):
    """Return documents of two rows: different ones."""
    return [bounds_of(total, documents), bounds_of(total, False)] if documents else [bounds_of(total, False)]


def compare(got, want):
    for ours, ref, name in zip(got, want, ("out", "dq", "dk", "dv", "dsink", "dgates"), strict=False):
        assert not ours.isnan().any(), name
        error = (ours - ref).abs().max().item()
        assert error < 1e-10, f"{name}: {error:.2e}"


FACTORS = {
    "kind": KINDS,
    "schedule": SCHEDULES,
    "layout": tuple(LAYOUTS),
    "moves": MOVES,
    "cp": CPS,
    "heads": ("mha", "gqa", "mqa"),
    "documents": (True, False),
    "alike": (True, False),
    "softcap": (False, True),
    "kernel": ("torch", "reference"),
}
CASES = covering(FACTORS, legal=legal)


def name(case):
    return "-".join(str(value) for value in case.values())


@pytest.mark.parametrize("case", CASES, ids=map(name, CASES))
def test_every_pair_of_factors(case):
    problem = problem_of(case, case["cp"])
    bounds = rows_of(problem.q.shape[1], case["documents"])
    ranks = run_ranks(case["cp"], lambda transport: on_rank(transport, case, problem, bounds))
    compare(together(ranks), one_rank(case, problem, bounds))


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("cp", [3, 8])
def test_every_pair_of_the_other_factors_on_each_schedule(cp, schedule):
    others = {key: FACTORS[key] for key in ("kind", "layout", "moves", "documents", "alike")}
    fixed = {"heads": "gqa", "softcap": False, "schedule": schedule, "cp": cp}
    for case in covering(others, legal=legal):
        case |= fixed
        problem = problem_of(case, cp)
        bounds = rows_of(problem.q.shape[1], case["documents"])
        ranks = run_ranks(cp, lambda transport: on_rank(transport, case, problem, bounds))  # noqa: B023
        compare(together(ranks), one_rank(case, problem, bounds))


def on_gloo(rank, world_size, group, cases):
    transport, results = ProcessGroupTransport(group), []
    for case in cases:
        problem = problem_of(case, world_size)
        layout, tensors, _ = on_rank(transport, case, problem, rows_of(problem.q.shape[1], case["documents"]))
        results.append((layout, tensors))
    return results


@pytest.mark.parametrize("world_size", [2, 4])
def test_gloo_ranks(gloo_pool, world_size):
    factors = {key: FACTORS[key] for key in ("kind", "schedule", "layout", "moves", "documents")}
    cases = covering(factors, legal=legal)
    cases = [case | {"heads": "gqa", "alike": True, "softcap": False} for case in cases]
    ranks = gloo_pool.run(on_gloo, world_size, cases)
    for index, case in enumerate(cases):
        problem = problem_of(case, world_size)
        bounds = rows_of(problem.q.shape[1], case["documents"])
        compare(together([rank[index] for rank in ranks]), one_rank(case, problem, bounds))
