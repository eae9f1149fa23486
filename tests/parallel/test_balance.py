"""Work per hop against the closed formulas, and what is said about a plan before it runs."""

import pytest
import torch

from longctx.kernels.mask import causal, documents, full, per_head, sliding_window
from longctx.parallel.balance import Balance, balance, describe, visible_pairs
from longctx.parallel.layout import Layout
from longctx.parallel.registry import resolve_schedule
from longctx.parallel.schedule import Shape
from longctx.parallel.schedules.ring import Ring, Ulysses, Usp

N = 64
SHAPE = Shape(heads=8, kv_heads=2, head_dim=16, v_head_dim=16, dtype=torch.bfloat16)


def hop_pairs(name: str, cp: int, n: int) -> list[list[int]]:
    work = balance(Layout(name, cp), [causal()], Ring(), total=cp * n)
    return [list(rank) for rank in work.pairs]


@pytest.mark.parametrize("cp", [2, 3, 4, 8])
def test_contiguous_work_per_hop(cp):
    for rank, hops in enumerate(hop_pairs("contiguous", cp, N)):
        assert hops == [N * (N + 1) // 2] + [N * N if hop <= rank else 0 for hop in range(1, cp)]


@pytest.mark.parametrize("cp", [2, 3, 4, 8])
def test_striped_work_per_hop(cp):
    for rank, hops in enumerate(hop_pairs("striped", cp, N)):
        sources = Ring().order(rank, cp)
        assert hops == [N * (N + 1) // 2 if source <= rank else N * (N - 1) // 2 for source in sources]


@pytest.mark.parametrize("cp", [2, 3, 4, 8])
def test_zigzag_work_per_hop(cp):
    for hops in hop_pairs("zigzag", cp, N):
        assert hops == [N * (N + 1) // 2] + [N * N // 2] * (cp - 1)


@pytest.mark.parametrize("cp", [2, 4, 8, 32])
def test_efficiency_of_one_causal_document(cp):
    def efficiency(name: str) -> float:
        return balance(Layout(name, cp), [causal()], Ring(), total=cp * N).efficiency

    assert efficiency("contiguous") == pytest.approx((cp * N + 1) / ((2 * cp - 1) * N + 1))
    assert efficiency("striped") == pytest.approx((cp * N + 1) / (cp * (N + 1)))
    assert efficiency("zigzag") == 1.0


def test_a_window_leaves_most_hops_idle_and_the_rest_balanced_on_contiguous_shards():
    work = balance(Layout("contiguous", 8), [sliding_window(63)], Ring(), total=8 * 256)
    assert work.efficiency > 0.95
    assert work.idle_hops == pytest.approx((8 * 8 - 8 - 7) / 64)


def test_striping_keeps_packed_documents_balanced_where_the_others_do_not():
    bounds = (0, 700, 760, 4000, 4013, 4100, 7900, 8192)
    mask = causal() & documents(bounds)
    efficiency = {
        name: balance(Layout(name, 8), [mask], Ring(), total=8192).efficiency
        for name in ("contiguous", "zigzag", "striped")
    }
    assert efficiency["striped"] > 0.99
    assert efficiency["contiguous"] < 0.7 and efficiency["zigzag"] < 0.8


@pytest.mark.parametrize(
    ("width", "one_document", "short_documents"),
    [(1, 0.9999, 0.9932), (16, 0.9983, 0.9015), (64, 0.9932, 0.6959), (128, 0.9865, 0.5336)],
)
def test_wide_stripes_cost_balance_where_documents_are_short(width, one_document, short_documents):
    """65,536 tokens at cp=8, as one document or as 64: spread evenly while a document is long against cp x width."""
    for length, efficiency in ((65536, one_document), (1024, short_documents)):
        mask = causal() & documents(tuple(range(0, 65537, length)))
        work = balance(Layout("striped", 8, width), [mask], Ring(), total=65536)
        assert work.efficiency == pytest.approx(efficiency, abs=1e-4)


@pytest.mark.parametrize("mask", [causal(), sliding_window(9), documents((0, 5, 31, 96)) & causal()])
@pytest.mark.parametrize(("name", "width"), [("contiguous", 1), ("zigzag", 1), ("striped", 1), ("striped", 4)])
@pytest.mark.parametrize("schedule", [Ring(), Ulysses(), Usp(ulysses=2), Usp(ulysses=2, innermost="ring")])
def test_all_layouts_and_schedules_do_the_same_work(name, width, schedule, mask):
    work = balance(Layout(name, 4, width), [mask], schedule, total=96)
    assert work.total == visible_pairs(mask, total=96)


def test_masks_per_head_count_every_head():
    masks = per_head([causal(), sliding_window(4), causal(), sliding_window(9)])
    each = [visible_pairs(mask, total=96) for mask in masks.masks]
    assert visible_pairs(masks, total=96) == round(sum(each) / 4)
    for schedule in (Ring(), Usp(ulysses=2), Ulysses()):
        assert balance(Layout("striped", 4), [masks], schedule, total=96).total == sum(each)


def test_without_lockstep_ranks_wait_for_each_other_once():
    """One causal document on contiguous shards: all_gather waits for the last rank, which does (2 cp - 1) / cp of the
    mean; a ring waits at every hop."""
    layout = Layout("contiguous", 4)
    ring, gather = (balance(layout, [causal()], resolve_schedule(name), total=4 * N) for name in ("ring", "all_gather"))
    assert all(len(rank) == 1 for rank in gather.pairs) and all(len(rank) == 4 for rank in ring.pairs)
    assert gather.total == ring.total and gather.imbalance == ring.imbalance
    assert gather.efficiency == pytest.approx(1 / gather.imbalance) and ring.efficiency <= gather.efficiency


def test_nothing_to_do_is_balanced():
    idle = Balance(((0, 0), (0, 0)))
    assert (idle.efficiency, idle.imbalance, idle.idle_hops) == (1.0, 1.0, 1.0)


def test_describe_tells_the_numbers():
    told = describe(Layout("contiguous", 8), [causal()], Ring(), total=8192, shape=SHAPE)
    assert told == (
        "contiguous x ring, cp=8, 8,192 tokens, 1 document(s), 1 tile(s) per layer on rank 0: 33,558,528 visible "
        "pairs, balance 53.3% of ideal, busiest rank 1.87x the mean, 44% of hops idle\n"
        "  28 of 56 hops needed; per layer a rank sends at most 0.9 MB in 7 exchange(s) forward, 2.5 MB in 13 backward"
    )


def test_describe_tells_what_is_sent_to_the_byte():
    """32 tokens travel past three ranks: two KV heads, K and V of 16, bfloat16, then float32 sums."""
    told = describe(Layout("striped", 4), [full()], Ring(), total=128, shape=SHAPE)
    assert "12 of 12 hops needed" in told and "at most 12.3 kB in 3 exchange(s) forward, 36.9 kB in 6 backward" in told
    assert round(3 * 32 * 2 * 32 * 2 / 1e3, 1) == 12.3 and round(3 * 32 * 2 * 32 * (2 + 4) / 1e3, 1) == 36.9
    alone = describe(Layout("contiguous", 1), [causal()], resolve_schedule("local"), total=128, shape=SHAPE)
    assert "sends" not in alone and "\n" not in alone


def test_a_plan_too_large_to_count_says_so_at_once():
    bounds = tuple(range(0, 64 * 64 + 1, 64))
    line = describe(Layout("striped", 64), [causal() & documents(bounds)], Ring(), total=64 * 64)
    assert line.endswith("visible pairs on rank 0, other ranks not counted")
