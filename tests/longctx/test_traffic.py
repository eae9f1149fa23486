"""Hops and bytes: what the transport counts equals the closed formulas, and what nobody sees is never sent.

n tokens per rank, H and HK heads, D channels; e bytes per element, 4 per element of float32 sums.
"""

import dataclasses
import itertools
from math import ceil

import pytest
import torch

from longctx.attention import ContextParallelAttention
from longctx.kernels.mask import causal, documents, full, sliding_window
from longctx.parallel.cost import traffic
from longctx.parallel.layout import Layout
from longctx.parallel.loopback import run_ranks
from longctx.parallel.schedule import Schedule, Shape
from longctx.parallel.schedules.all_gather import AllGather
from longctx.parallel.schedules.ring import DoubleRing, Ring, Ulysses, Usp
from longctx.parallel.transport import ProcessGroupTransport
from tests.support.attention import LAYOUTS, SCHEDULES, make_heads, make_mask, make_problem, make_schedule
from tests.support.pairs import covering

N, D, BATCH = 6, 4, 2


@dataclasses.dataclass
class Pass:
    """What one rank did in one pass."""

    hops: int
    bytes: int
    bytes_to: dict[int, int]


def count(transport, layout, schedule: Schedule, mask, problem, dtype=torch.float32) -> tuple[Pass, Pass]:
    attention = ContextParallelAttention(layout=layout, schedule=schedule, transport=transport)
    total = problem.q.shape[1]
    q, k, v, dout = (
        layout.shard(x, rank=transport.rank, dim=1).to(dtype).requires_grad_()
        for x in (problem.q, problem.k, problem.v, problem.dout)
    )
    out = attention(q, k, v, plan=attention.plan([mask], total=total))
    seen = transport.traffic
    forward = Pass(seen.hops, seen.bytes, dict(seen.bytes_to))
    torch.autograd.grad(out, (q, k, v), dout)
    back = {peer: sent - forward.bytes_to.get(peer, 0) for peer, sent in seen.bytes_to.items()}
    return forward, Pass(seen.hops - forward.hops, seen.bytes - forward.bytes, back)


def counted(cp, schedule, mask, heads, *, layout=None, n=N, dtype=torch.float32) -> list[tuple[Pass, Pass]]:
    layout = layout or Layout("striped", cp)
    problem = make_problem(cp * n, heads, batch=BATCH, head_dim=D)
    return run_ranks(cp, lambda t: count(t, layout, schedule, mask, problem, dtype))


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("cp", [1, 2, 3, 4, 8])
@DTYPES
def test_ring(cp, kv_heads, dtype):
    """Forward cp - 1 hops of K/V; backward as many, and as many of dK/dV: the owner's share never leaves (2 cp - 2)."""
    kv, e = 2 * BATCH * N * kv_heads * D, dtype.itemsize
    for forward, backward in counted(cp, Ring(backward_moves="rotate_kv"), full(), (4, kv_heads), dtype=dtype):
        assert (forward.hops, forward.bytes) == (cp - 1, (cp - 1) * kv * e)
        assert (backward.hops, backward.bytes) == (2 * (cp - 1), (cp - 1) * kv * (e + 4))


@pytest.mark.parametrize("cp", [1, 2, 3, 4, 8])
@DTYPES
def test_burst(cp, dtype):
    """Backward cp - 1 hops of q, dout, delta and lse, and as many of dq."""
    rows, e = BATCH * N * 4, dtype.itemsize
    for forward, backward in counted(cp, Ring(backward_moves="rotate_q"), full(), (4, 2), dtype=dtype):
        assert (forward.hops, forward.bytes) == (cp - 1, (cp - 1) * 2 * BATCH * N * 2 * D * e)
        assert (backward.hops, backward.bytes) == (2 * (cp - 1), (cp - 1) * rows * (2 * D * e + 2 * 4 + D * 4))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dtype", "moves"),
    [
        (32, 32, torch.bfloat16, True),  # 3/4 + of the bytes
        (32, 32, torch.float32, True),
        (32, 16, torch.bfloat16, False),
        (32, 8, torch.bfloat16, False),
        (40, 32, torch.float32, True),  # float32: below 4/3 groups
        (44, 32, torch.float32, False),
        (46, 32, torch.bfloat16, True),  # 16-bit, float32 gradients: below 3/2
        (48, 32, torch.bfloat16, False),
    ],
)
def test_auto_sends_what_is_smaller(heads, kv_heads, dtype, moves):
    shape = Shape(heads=heads, kv_heads=kv_heads, head_dim=128, v_head_dim=128, dtype=dtype)
    assert Ring().moves_queries(shape) == moves
    assert Ring(backward_moves="rotate_q").moves_queries(shape) and not Ring(backward_moves="rotate_kv").moves_queries(
        shape
    )
    table = tuple(((0, 10),) * 4 for _ in range(4))
    from longctx.parallel.needs import Needs

    auto, kv, q = (
        Ring(backward_moves=moving).sent(0, Needs(table, table), shape)[1].bytes
        for moving in ("auto", "rotate_kv", "rotate_q")
    )
    assert auto == min(kv, q) and kv != q


@pytest.mark.parametrize(("cp", "inner"), [(4, 2), (8, 2), (8, 4), (6, 3)])
def test_double_ring_crosses_between_machines_once_per_shard(cp, inner):
    """K/V cross O - 1 times per pass, dK/dV O times (the last time home): not at every hop, as on one ring."""
    outer, kv = cp // inner, 2 * BATCH * N * 2 * D * 4
    ranks = counted(cp, DoubleRing(ranks_per_ring=inner, backward_moves="rotate_kv"), full(), (4, 2))
    plain = counted(cp, Ring(backward_moves="rotate_kv"), full(), (4, 2))

    def far(passes):
        return [
            sum(sent for peer, sent in each.bytes_to.items() if peer // inner != rank // inner) for rank, each in passes
        ]

    forward = far([(rank, each[0]) for rank, each in enumerate(ranks)])
    assert forward == [(outer - 1) * kv] * cp
    backward = far([(rank, each[1]) for rank, each in enumerate(ranks)])
    # K/V as before; the sums of a shard cross each time it goes to another ring, and on their way home.
    assert sum(backward) == cp * (outer - 1) * kv + cp * outer * kv
    assert sum(far([(rank, each[0]) for rank, each in enumerate(plain)])) == outer * (cp - 1) * kv  # at every hop
    for there, back in ranks:
        assert there.bytes == (cp - 1) * kv and back.bytes == 2 * (cp - 1) * kv


@pytest.mark.parametrize("cp", [1, 2, 3, 4, 8])
@pytest.mark.parametrize(("kv_heads", "at_a_time"), [(4, 1), (4, 2), (4, 4), (1, 1)])
@DTYPES
def test_all_gather(cp, kv_heads, at_a_time, dtype):
    """One exchange of K/V per group of heads and pass, and one of gradients: all-gather and reduce-scatter volumes."""
    kv, e, groups = 2 * BATCH * N * kv_heads * D, dtype.itemsize, kv_heads // at_a_time if cp > 1 else 0
    for forward, backward in counted(cp, AllGather(gather_heads=at_a_time), full(), (4, kv_heads), dtype=dtype):
        assert (forward.hops, forward.bytes) == (groups, (cp - 1) * kv * e)
        assert (backward.hops, backward.bytes) == (2 * groups, (cp - 1) * kv * (e + 4))


@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8])
@pytest.mark.parametrize("cp", [1, 2, 4, 8])
@DTYPES
def test_ulysses(cp, kv_heads, dtype):
    """(cp-1)/cp n (2H + 2HK max(1, cp/HK)) D each way; backward adds delta, and float32 sums of repeated KV heads."""
    heads, e = 8, dtype.itemsize
    sent, kv = (cp - 1) * BATCH * N * D, kv_heads * max(1, cp // kv_heads)
    wide = 4 if cp > kv_heads else e
    for forward, backward in counted(cp, Ulysses(), full(), (heads, kv_heads), dtype=dtype):
        assert forward.bytes == sent * (2 * heads + 2 * kv) * e // cp
        assert backward.bytes == sent * (2 * heads * e + 2 * kv * wide) // cp + sent // D * heads * 4 // cp
        assert forward.hops == backward.hops == (2 if cp > 1 else 0)


@pytest.mark.parametrize("innermost", ["ulysses", "ring"])
@pytest.mark.parametrize(("ulysses", "rings"), [(2, 2), (2, 4), (4, 2)])
def test_usp(ulysses, rings, innermost):
    """All-to-alls among U ranks, and a ring of R over n U tokens of 1/U of the heads."""
    schedule = Usp(ulysses=ulysses, innermost=innermost, backward_moves="rotate_kv")
    cp, heads, kv_heads = ulysses * rings, 8, 4
    a2a, ring = (ulysses - 1) * BATCH * N * D // ulysses, 2 * BATCH * N * kv_heads * D
    near = {rank: rank // ulysses if innermost == "ulysses" else rank % rings for rank in range(cp)}
    for rank, (forward, backward) in enumerate(counted(cp, schedule, full(), (heads, kv_heads))):
        assert forward.bytes == a2a * (2 * heads + 2 * kv_heads) * 4 + (rings - 1) * ring * 4
        assert backward.bytes == a2a * ((2 * heads + 2 * kv_heads) * 4 + heads * 4 // D) + (rings - 1) * ring * 8
        inside = sum(sent for peer, sent in forward.bytes_to.items() if near[peer] == near[rank])
        assert inside == a2a * (2 * heads + 2 * kv_heads) * 4
        assert (forward.hops, backward.hops) == (2 + rings - 1, 2 + 2 * (rings - 1))


@pytest.mark.parametrize("window", [2, 6, 7, 8, 13, 14, 30, 48])
def test_a_window_on_contiguous_shards_sends_the_halo_only(window):
    """W keys per query, its own included: ceil((W - 1) / n) hops, and W - 1 tokens for every rank that has as many."""
    cp, kv = 8, 2 * BATCH * 2 * D * 4
    mask, layout = sliding_window(window - 1), Layout("contiguous", cp)
    hops = min(ceil((window - 1) / N), cp - 1)
    halos = [min(window - 1, rank * N) for rank in range(cp)]
    ring = counted(cp, Ring(backward_moves="rotate_kv"), mask, (4, 2), layout=layout)
    assert max(forward.hops for forward, _ in ring) == hops
    assert max(backward.hops for _, backward in ring) == 2 * hops
    gather = counted(cp, AllGather(gather_heads=2), mask, (4, 2), layout=layout)
    for passes in (ring, gather):
        assert sum(forward.bytes for forward, _ in passes) == sum(halos) * kv
    # K/V again, and gradients of the same tokens straight back.
    assert sum(backward.bytes for _, backward in gather) == 2 * sum(halos) * kv
    # On a ring the sums collect on their way: every rank that adds passes on what the first one added to.
    collected = sum(min(window - 1, N) * min(hops, cp - 1 - rank) for rank in range(cp))
    assert sum(backward.bytes for _, backward in ring) == (sum(halos) + collected) * kv
    burst = counted(cp, Ring(backward_moves="rotate_q"), mask, (4, 2), layout=layout)
    assert max(backward.hops for _, backward in burst) == 2 * hops
    assert sum(backward.bytes for _, backward in burst) == (sum(halos) * (2 * D + 2) + collected * D) * BATCH * 4 * 4


def test_a_window_to_both_sides_sends_both_halos():
    """Only the neighbours talk, though the one before is the last that a ring's shard comes to."""
    cp, kv = 8, 2 * BATCH * 2 * D * 4
    for moving in ("rotate_kv", "rotate_q"):
        ranks = counted(cp, Ring(backward_moves=moving), sliding_window(3, 2), (4, 2), layout=Layout("contiguous", cp))
        for rank, (forward, backward) in enumerate(ranks):
            after, before = rank + 1, rank - 1
            assert forward.bytes_to == {p: t * kv for p, t in ((after, 3), (before, 2)) if 0 <= p < cp}
            assert set(backward.bytes_to) == set(forward.bytes_to) and forward.hops == 2


@pytest.mark.parametrize("name", ["ring", "burst", "double_ring", "double_burst", "all_gather"])
def test_documents_that_end_with_their_shard_need_no_hop(name):
    mask = causal() & documents((0, 4, 6, 12, 13, 18, 24, 26, 30, 36, 42, 48))  # 6 tokens per rank
    for forward, backward in counted(8, make_schedule(name, 8), mask, (4, 2), layout=Layout("contiguous", 8)):
        assert (forward.hops, forward.bytes, backward.hops, backward.bytes) == (0, 0, 0, 0)


def test_only_the_document_across_a_bound_travels():
    """Documents [0, 10) and [10, 24) at 6 tokens per rank: rank 0 gives 1 its tokens, and 1 its last two to 2 and 3."""
    mask, kv = causal() & documents((0, 10, 24)), 2 * BATCH * 2 * D * 4
    ranks = counted(4, AllGather(gather_heads=2), mask, (4, 2), layout=Layout("contiguous", 4))
    assert [forward.bytes_to for forward, _ in ranks] == [{1: 6 * kv}, {2: 2 * kv, 3: 2 * kv}, {3: 6 * kv}, {}]


@pytest.mark.parametrize("cp", [2, 4, 8])
def test_half_of_a_causal_contiguous_ring_is_not_sent(cp):
    ranks = counted(cp, Ring(backward_moves="rotate_kv"), causal(), (4, 2), layout=Layout("contiguous", cp))
    kv = 2 * BATCH * N * 2 * D * 4
    assert sum(forward.bytes for forward, _ in ranks) == cp * (cp - 1) // 2 * kv


def test_far_sinks_cost_their_tokens_and_not_their_shard():
    """A window of 4 with 2 sinks: beyond the halo only the two first tokens go round."""
    cp, kv = 8, 2 * BATCH * 2 * D * 4
    layout = Layout("contiguous", cp)
    gather = counted(cp, AllGather(gather_heads=2), sliding_window(3, sinks=2), (4, 2), layout=layout)
    # Rank 1 needs the sinks and the last three of rank 0's six: the span that holds both is the shard.
    assert gather[0][0].bytes_to == {1: 6 * kv, **dict.fromkeys(range(2, cp), 2 * kv)}
    assert [gather[rank][0].bytes_to for rank in range(1, cp - 1)] == [{rank + 1: 3 * kv} for rank in range(1, cp - 1)]
    ring = counted(cp, Ring(backward_moves="rotate_kv"), sliding_window(3, sinks=2), (4, 2), layout=layout)
    assert sum(forward.bytes for forward, _ in ring) == (6 + 6 * 2 + 6 * 3) * kv


def on_gloo(rank: int, world_size: int, group, cases):
    transport, results = ProcessGroupTransport(group), []
    for layout, schedule, mask in cases:
        heads = make_heads("gqa", world_size)
        problem = make_problem(world_size * 7, heads, batch=BATCH, head_dim=D)
        before = (transport.traffic.hops, dict(transport.traffic.bytes_to))
        placed = Layout(LAYOUTS[layout][0], world_size, LAYOUTS[layout][1])
        chosen = make_mask(mask, world_size * 7, heads=heads[0])
        way = make_schedule(schedule, world_size)
        count(transport, placed, way, chosen, problem)
        shape = Shape(heads=heads[0], kv_heads=heads[1], head_dim=D, v_head_dim=D, dtype=torch.float32)
        attention = ContextParallelAttention(layout=placed, schedule=way, transport=transport)
        forward, backward = traffic(attention.plan([chosen], total=world_size * 7), shape, batch=BATCH)
        hops = transport.traffic.hops - before[0]
        sent = {peer: total - before[1].get(peer, 0) for peer, total in transport.traffic.bytes_to.items()}
        predicted = dict.fromkeys(sent, 0)
        for each in (forward, backward):
            for peer, size in each.bytes_to.items():
                predicted[peer] += size
        results.append((hops == forward.hops + backward.hops, sent == predicted))
    return results


FACTORS = {
    "layout": tuple(LAYOUTS),
    "schedule": SCHEDULES,
    "mask": ("causal", "window", "documents", "sinks_window", "prefix_documents", "per_head"),
}
PAIRS = [tuple(case.values()) for case in covering(FACTORS)]
PRODUCT = pytest.param(list(itertools.product(*FACTORS.values())), marks=pytest.mark.slow)


@pytest.mark.parametrize("cases", [PAIRS, PRODUCT], ids=["pairs", "product"])
@pytest.mark.parametrize("world_size", [2, 4])
def test_the_plan_predicts_real_ranks_to_the_byte(gloo_pool, world_size, cases):
    for results in gloo_pool.run(on_gloo, world_size, cases):
        assert [case for case, right in zip(cases, results, strict=True) if right != (True, True)] == []
