"""Predictions: what must hold whatever the numbers, and which way they point."""

import dataclasses
import random
from functools import lru_cache

import pytest
import torch

from longctx.kernels.mask import HeadMasks, Mask, causal, documents, full, per_head, prefix_lm, sliding_window
from longctx.parallel.balance import balance, visible_pairs
from longctx.parallel.cost import traffic
from longctx.parallel.layout import Layout
from longctx.parallel.links import DEFAULTS, KEYS, Speeds, resolve_speeds
from longctx.parallel.mesh import ParallelConfig
from longctx.parallel.plan import plan
from longctx.parallel.predict import Prediction, predict
from longctx.parallel.schedule import Schedule, Shape
from longctx.parallel.schedules.all_gather import AllGather
from longctx.parallel.schedules.ring import DoubleRing, Ring, Ulysses, Usp
from longctx.parallel.simulate import BACKWARD_FLOPS
from longctx.parallel.workload import Counter, sampled_documents

GQA = Shape(heads=8, kv_heads=2, head_dim=64, v_head_dim=64, dtype=torch.bfloat16)
MHA = dataclasses.replace(GQA, kv_heads=8)
FREE = Speeds(local=1e30, network=1e30, latency=0.0, flops=1e12, call=0.0)
USUAL = Speeds(local=100e9, network=10e9, latency=1e-5, flops=1e14, call=1e-5)
SCHEDULES: dict[str, Schedule] = {
    "ring": Ring(backward_moves="rotate_kv"),
    "burst": Ring(backward_moves="rotate_q"),
    "double_ring": DoubleRing(ranks_per_ring=2),
    "double_burst": DoubleRing(ranks_per_ring=4, backward_moves="rotate_q"),
    "all_gather": AllGather(),
    "all_gather2": AllGather(gather_heads=2),
    "ulysses": Ulysses(),
    "usp": Usp(ulysses=2),
    "usp-outer": Usp(ulysses=4, innermost="ring"),
}
LAYOUTS = {"contiguous": 1, "zigzag": 1, "striped": 1, "striped16": 16}
RING = ("ring", "burst", "double_ring", "double_burst")


def packed(total: int, longest: int, *, seed: int = 0) -> tuple[int, ...]:
    """Return bounds of documents of 1 to `longest` tokens."""
    draw, bounds = random.Random(seed), [0]
    while bounds[-1] < total:
        bounds.append(min(bounds[-1] + draw.randint(1, longest), total))
    return tuple(bounds)


MASKS: dict[str, Mask | HeadMasks] = {
    "causal": causal(),
    "window": sliding_window(100),
    "documents": causal() & documents(packed(2048, 300)),
    "per_head": per_head([causal() if head % 2 else sliding_window(50) for head in range(8)]),
}


def make_layout(name: str, cp: int) -> Layout:
    return Layout(name.rstrip("0123456789"), cp, LAYOUTS[name])  # type: ignore[arg-type]


def predicted(
    layout: str,
    schedule: Schedule,
    mask: Mask | HeadMasks,
    *,
    cp: int = 8,
    total: int = 2048,
    shape: Shape = GQA,
    speeds: Speeds = USUAL,
    per_machine: int = 8,
    limit: int = 10**9,
) -> Prediction:
    counter = counted(mask, total, shape.heads, limit)
    return predict(make_layout(layout, cp), schedule, counter, shape=shape, speeds=speeds, per_machine=per_machine)


@lru_cache
def counted(mask: Mask | HeadMasks, total: int, heads: int, limit: int) -> Counter:
    """Counting is what takes time, and does not depend on speeds."""
    return Counter(mask, total=total, heads=heads, limit=limit)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("shape", [GQA, MHA], ids=["gqa", "mha"])
def test_predicted_bytes_are_the_counted_ones(schedule, layout, mask, shape):
    got = predicted(layout, SCHEDULES[schedule], MASKS[mask], shape=shape, per_machine=4)
    sent = []
    for rank in range(8):
        each = plan(make_layout(layout, 8), (MASKS[mask],), SCHEDULES[schedule], rank=rank, total=2048)
        passes = traffic(each, shape)
        far = sum(n for one in passes for peer, n in one.bytes_to.items() if peer // 4 != rank // 4)
        sent.append((sum(one.bytes for one in passes), far))
    assert got.bytes == max(all_bytes for all_bytes, _ in sent) and got.far_bytes == max(far for _, far in sent)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_free_links_leave_the_work_of_the_busiest_rank(schedule, layout):
    """A layer takes at least the ideal and its busiest rank's work, and at most the sum of the busiest hops."""
    for mask in MASKS.values():
        got = predicted(layout, SCHEDULES[schedule], mask, speeds=FREE)
        pairs = visible_pairs(mask, total=2048)
        assert got.ideal == pytest.approx(3.5 * 8 * pairs * 4 * 64 / 8 / 1e12, rel=1e-3)
        assert got.ideal * (1 - 1e-9) <= got.compute <= got.seconds * (1 + 1e-9)
        if not isinstance(mask, HeadMasks):
            work = balance(make_layout(layout, 8), [mask], SCHEDULES[schedule], total=2048)
            if "burst" not in schedule:  # another rank does the work then
                assert got.compute == pytest.approx(got.ideal * work.imbalance)
                assert got.seconds <= got.ideal / work.efficiency * (1 + 1e-9)


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
def test_a_causal_ring_takes_what_the_closed_formulas_say(layout):
    got = predicted(layout, SCHEDULES["ring"], causal(), speeds=FREE)
    work = balance(Layout(layout, 8), [causal()], Ring(), total=2048)
    assert got.efficiency == pytest.approx(work.efficiency)
    assert got.backward == pytest.approx(BACKWARD_FLOPS * got.forward)


def test_hidden_and_exposed_hops():
    """Full attention on equal shards: hops hide behind equal work, and what is longer than the work is exposed."""
    n, cp = 256, 4
    work = n * n * 8 * 4 * 64 / 1e12
    shard = n * 2 * 2 * 64 * 2

    def forward(bytes_per_second: float) -> float:
        speeds = dataclasses.replace(FREE, local=bytes_per_second)
        return predicted("contiguous", Ring(), full(), cp=cp, total=cp * n, speeds=speeds).forward

    assert forward(shard / (0.5 * work)) == pytest.approx(cp * work)
    assert forward(shard / (3 * work)) == pytest.approx(work + (cp - 1) * 3 * work)


def test_all_to_alls_are_exposed():
    speeds = dataclasses.replace(FREE, local=1e9)
    got = predicted("contiguous", Ulysses(), causal(), shape=MHA, speeds=speeds)
    tokens, head = 2048 // 8, 64 * 2
    # q, k, v there and out back; dout and delta there, dq, dk, dv back: one head for each of seven peers.
    sent = 7 * tokens * (3 * head + head + head + 4 + 3 * head)
    assert got.bytes == sent and got.exposed == pytest.approx(sent / 1e9)


def test_the_slower_link_decides_and_is_crossed_less_by_a_double_ring():
    speeds = dataclasses.replace(FREE, local=1e10, network=1e8)
    ring, double = (
        predicted("striped", schedule, causal(), speeds=speeds, per_machine=4)
        for schedule in (Ring(), DoubleRing(ranks_per_ring=4))
    )
    assert double.far_bytes < ring.far_bytes and double.seconds < ring.seconds
    same = predicted("striped", DoubleRing(ranks_per_ring=4), causal(), speeds=speeds, per_machine=8)
    assert same.far_bytes == 0 and same.seconds < double.seconds


@pytest.mark.parametrize("key", ["local", "network", "flops", "latency", "call"])
def test_faster_is_never_slower(key):
    better = 0.5 if key in ("latency", "call") else 2.0
    for schedule in SCHEDULES.values():
        for layout in LAYOUTS:
            for mask in (MASKS["causal"], MASKS["documents"]):
                speeds, last = USUAL, float("inf")
                for _ in range(3):
                    now = predicted(layout, schedule, mask, speeds=speeds, per_machine=4).seconds
                    assert now <= last * (1 + 1e-12), (layout, schedule, key)
                    speeds, last = dataclasses.replace(speeds, **{key: getattr(speeds, key) * better}), now


def test_the_backward_pass_that_sends_less_is_predicted_to_be_faster_on_slow_links():
    slow = dataclasses.replace(FREE, local=1e8)
    for shape, cheaper in ((MHA, "burst"), (GQA, "ring")):
        times = {
            name: predicted("striped", SCHEDULES[name], full(), shape=shape, speeds=slow).backward for name in RING
        }
        assert min(("ring", "burst"), key=times.__getitem__) == cheaper
        auto = predicted("striped", Ring(), full(), shape=shape, speeds=slow).backward
        assert auto == times[cheaper]


@pytest.mark.parametrize("mask", [causal(), sliding_window(64), sliding_window(64, sinks=2), prefix_lm(8)])
def test_some_documents_stand_for_all(mask):
    """The work of a quarter of the documents, scaled, is that of all within a few percent."""
    mask = mask & documents(packed(65536, 1000))
    whole = predicted("striped", Ring(), mask, total=65536)
    limit = 64 * 33
    part = predicted("striped", Ring(), mask, total=65536, limit=limit)
    assert whole.sampled is None and part.sampled == 33
    assert part.ideal == pytest.approx(whole.ideal, rel=1e-3)
    assert part.bytes == whole.bytes
    assert part.compute == pytest.approx(whole.compute, rel=0.05) and part.seconds == pytest.approx(whole.seconds, 0.05)
    assert predicted("contiguous", Ring(), mask, total=65536, limit=limit).sampled is None


def test_sampled_documents_keep_the_mix_of_lengths():
    lengths = [10] * 30 + [1000] * 10
    random.Random(0).shuffle(lengths)
    bounds = [0]
    for length in lengths:
        bounds.append(bounds[-1] + length)
    mask, total = sampled_documents(causal() & documents(tuple(bounds)), bounds[-1], keep=8, multiple_of=7) or (None, 0)
    assert isinstance(mask, Mask) and mask.cu_seqlens is not None
    kept = sorted(b - a for a, b in zip(mask.cu_seqlens, mask.cu_seqlens[1:], strict=False))
    assert kept[:6] == [10] * 6 and kept[6] == 1000 and 1000 <= kept[7] < 1007 and total % 7 == 0
    assert sampled_documents(prefix_lm((3, 4), (0, 8, 16)), 16, keep=1, multiple_of=1) is None


def test_speeds_given_and_usual():
    usual = resolve_speeds(ParallelConfig(), device_type="cuda", peak_flops=1000e12)
    assert (usual.flops, usual.local, usual.source) == (400e12, 300e9, "usual for cuda")
    given = resolve_speeds(ParallelConfig(network_gb_per_s=3.0, call_us=0.0), device_type="cpu")
    assert (given.network, given.call, given.latency) == (3e9, 0.0, 200e-6)
    assert "parallel.network_gb_per_s, parallel.call_us given" in given.describe()
    assert all(len(values) == len(KEYS) for values in DEFAULTS.values())


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), 0.0])
def test_impossible_speeds_are_refused(key, value):
    config = ParallelConfig(**{key: value})
    if value == 0.0 and key.endswith("_us"):
        config.validate()
        return
    with pytest.raises(ValueError, match=f"parallel.{key} must be finite and >=? ?0?"):
        config.validate()
