"""Work per hop against the closed formulas, and what a plan says about balance."""

import pytest

from longctx.kernels.mask import causal, documents, sliding_window
from longctx.parallel.layout import Layout
from longctx.parallel.plan import balance, describe, plan, plans_for, visible_pairs
from longctx.parallel.schedules.ring import Ring

N = 64


def hop_pairs(name: str, cp: int, n: int) -> list[list[int]]:
    work = balance(Layout(name, cp), causal(), Ring(), total=cp * n)
    return [list(rank) for rank in work.pairs]


@pytest.mark.parametrize("cp", [2, 3, 4, 8])
def test_contiguous_work_per_hop(cp):
    for rank, hops in enumerate(hop_pairs("contiguous", cp, N)):
        assert hops == [N * (N + 1) // 2] + [N * N if hop <= rank else 0 for hop in range(1, cp)]


@pytest.mark.parametrize("cp", [2, 3, 4, 8])
def test_striped_work_per_hop(cp):
    for rank, hops in enumerate(hop_pairs("striped", cp, N)):
        sources = Ring().sources(rank, cp)
        assert hops == [N * (N + 1) // 2 if source <= rank else N * (N - 1) // 2 for source in sources]


@pytest.mark.parametrize("cp", [2, 3, 4, 8])
def test_zigzag_work_per_hop(cp):
    for hops in hop_pairs("zigzag", cp, N):
        assert hops == [N * (N + 1) // 2] + [N * N // 2] * (cp - 1)


@pytest.mark.parametrize("cp", [2, 4, 8, 32])
def test_efficiency_of_one_causal_document(cp):
    def efficiency(name: str) -> float:
        return balance(Layout(name, cp), causal(), Ring(), total=cp * N).efficiency

    assert efficiency("contiguous") == pytest.approx((cp * N + 1) / ((2 * cp - 1) * N + 1))
    assert efficiency("striped") == pytest.approx((cp * N + 1) / (cp * (N + 1)))
    assert efficiency("zigzag") == 1.0


def test_striping_keeps_packed_documents_balanced_where_the_others_do_not():
    bounds = (0, 700, 760, 4000, 4013, 4100, 7900, 8192)
    mask = causal() & documents(bounds)
    efficiency = {
        name: balance(Layout(name, 8), mask, Ring(), total=8192).efficiency
        for name in ("contiguous", "zigzag", "striped")
    }
    assert efficiency["striped"] > 0.99
    assert efficiency["contiguous"] < 0.7 and efficiency["zigzag"] < 0.8


@pytest.mark.parametrize("mask", [causal(), sliding_window(9), documents((0, 5, 31, 96)) & causal()])
@pytest.mark.parametrize(("name", "width"), [("contiguous", 1), ("zigzag", 1), ("striped", 1), ("striped", 4)])
def test_all_layouts_do_the_same_work(name, width, mask):
    work = balance(Layout(name, 4, width), mask, Ring(), total=96)
    assert work.total == visible_pairs(mask, total=96)


def test_a_rank_holds_every_shard_once_its_own_first():
    for rank in range(5):
        sources = Ring().sources(rank, 5)
        assert sources[0] == rank and sorted(sources) == list(range(5))


def test_describe_is_one_line_with_the_numbers():
    line = describe(Layout("contiguous", 8), causal(), Ring(), total=8192)
    assert line == (
        "contiguous x ring, cp=8, 8,192 tokens, 1 document(s), 1 tile(s) per layer on rank 0: 33,558,528 visible "
        "pairs, balance 53.3% of ideal, busiest rank 1.87x the mean, 44% of hops idle"
    )


def test_rows_with_equal_masks_share_a_plan():
    layout = Layout("striped", 2)
    same = plans_for(layout, [causal(), causal()], Ring(), rank=0, total=8)
    assert len(same) == 1 and same[0] is plan(layout, causal(), Ring(), rank=0, total=8)
    assert len(plans_for(layout, [causal(), causal() & documents((0, 3, 8))], Ring(), rank=0, total=8)) == 2


def test_a_plan_too_large_to_count_says_so_at_once():
    bounds = tuple(range(0, 64 * 64 + 1, 64))
    line = describe(Layout("striped", 64), causal() & documents(bounds), Ring(), total=64 * 64)
    assert line.endswith("visible pairs on rank 0, other ranks not counted")


@pytest.mark.parametrize(
    ("width", "one_document", "short_documents"),
    [(1, 0.9999, 0.9932), (16, 0.9983, 0.9015), (64, 0.9932, 0.6959), (128, 0.9865, 0.5336)],
)
def test_wide_stripes_cost_balance_where_documents_are_short(width, one_document, short_documents):
    """65,536 tokens at cp=8, as one document or as 64: spread evenly while a document is long against cp x width."""
    for length, efficiency in ((65536, one_document), (1024, short_documents)):
        mask = causal() & documents(tuple(range(0, 65537, length)))
        work = balance(Layout("striped", 8, width), mask, Ring(), total=65536)
        assert work.efficiency == pytest.approx(efficiency, abs=1e-4)
