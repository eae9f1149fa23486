"""FLOPs by hand-counted values, the table of peaks, and the step's clock."""

import sys
import time
from collections.abc import Iterator

import pytest
import torch

from longctx.metrics import flops
from longctx.metrics.flops import attention_flops, gpu_peak, measured_peak, mfu, model_flops_per_step, peak_flops
from longctx.metrics.meter import Eta, Smoothed, StepMeter, memory_peak_bytes


def test_flops_by_hand() -> None:
    # 4 tokens, causal: 4 * 5 / 2 = 10 pairs. Full pairs would be 16.
    assert attention_flops(visible_pairs=3 * 10, num_heads=2, head_dim=8) == 12 * 3 * 10 * 2 * 8 == 5760
    total = model_flops_per_step(
        tokens=4, num_params_in_matmuls=1000, visible_pairs=3 * 10, num_heads=2, head_dim=8, recurrences=70
    )
    assert total == 4 * 6 * 1000 + 5760 + 4 * 70


def test_dense_flops_agree_with_torch_own_counter() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    # No weight sees an input that needs a gradient less than the formula assumes: the first layer is not counted.
    first, second = torch.nn.Linear(8, 16, bias=False), torch.nn.Linear(16, 32, bias=False)
    x = first(torch.ones(5, 8))
    with FlopCounterMode(display=False) as counter:
        second(x).sum().backward()
    first_backward = 2 * 5 * 8 * 16
    assert counter.get_total_flops() - first_backward == 5 * flops.dense_flops_per_token(16 * 32)


def test_attention_flops_agree_with_torch_own_counter() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    q, k, v = (torch.ones(1, 2, 6, 8, requires_grad=True) for _ in range(3))
    with FlopCounterMode(display=False) as counter:
        ((q @ k.transpose(-1, -2)).softmax(-1) @ v).sum().backward()
    assert counter.get_total_flops() == attention_flops(visible_pairs=36, num_heads=2, head_dim=8)


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA L40S", 362),
        ("NVIDIA L40", 181),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA RTX 6000 Ada Generation", 364.2),
    ],
)
def test_known_gpus(name: str, tera: float) -> None:
    peak = gpu_peak(name, dtype=torch.bfloat16, tf32=False)
    assert peak is not None
    assert peak.value == pytest.approx(tera * 1e12)
    assert name in peak.description
    assert "bfloat16" in peak.description


def test_float32_counts_against_the_unit_that_runs_it() -> None:
    plain = gpu_peak("NVIDIA H100 80GB HBM3", dtype=torch.float32, tf32=False)
    tf32 = gpu_peak("NVIDIA H100 80GB HBM3", dtype=torch.float32, tf32=True)
    assert plain is not None
    assert tf32 is not None
    assert (plain.value, tf32.value) == (67e12, 494.5e12)


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA A100-SXM4-80GB MIG 1g.10gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA A10G",
        "Tesla T4",
    ],
)
def test_other_gpus_are_not_taken_for_known_ones(name: str) -> None:
    assert gpu_peak(name, dtype=torch.bfloat16, tf32=False) is None


def test_float64_is_in_no_table() -> None:
    assert gpu_peak("NVIDIA H200", dtype=torch.float64, tf32=False) is None


def test_peak_of_the_cpu_is_measured_and_short() -> None:
    begin = time.perf_counter()
    value, description = peak_flops("cpu", torch.float32, override=None)
    assert time.perf_counter() - begin < 5  # 0.2 s where nothing else runs
    assert 1e8 < value < 1e14
    assert "measured matmul of 512x512, float32" in description
    assert measured_peak("cpu", dtype=torch.float32, seconds=0.0).value > 0


def test_peak_can_be_given() -> None:
    assert peak_flops("cuda", torch.bfloat16, override=5e13) == (5e13, "50 TFLOP/s, as given by logger.peak_flops")


def test_mfu() -> None:
    assert mfu(model_flops=6e12, seconds=2.0, num_devices=3, peak=4e12) == pytest.approx(0.25)


def _clock(*times: float) -> Iterator[float]:
    yield from times


def test_step_meter_by_literal_values() -> None:
    times = _clock(10.0, 11.0, 12.0, 13.0, 13.5, 20.0, 100.0, 105.0)
    meter = StepMeter(world_size=2, device_type="cpu", peak_flops=1e9, clock=lambda: next(times))
    meter.begin()
    with meter.waiting_for_data():
        pass
    with pytest.raises(KeyError), meter.waiting_for_data():
        raise KeyError("the data broke")
    metrics = meter.end(tokens=5000, model_flops=4e9)
    assert metrics.pop("memory_peak_bytes") > 2**20
    assert metrics == {
        "step_seconds": 10.0,
        "tokens_per_second": 500.0,
        "tokens_per_second_per_rank": 250.0,
        "data_wait_share": pytest.approx(0.15),
        "mfu": pytest.approx(0.2),
    }
    meter.begin()
    second = meter.end(tokens=5000, model_flops=4e9)
    assert (second["step_seconds"], second["data_wait_share"]) == (5.0, 0.0)


def test_eta_uses_the_wall_time_between_steps() -> None:
    times = _clock(0.0, 5.0, 10.0)
    eta = Eta(total_steps=10, clock=lambda: next(times))
    assert eta.update(1, step_seconds=5.0) == pytest.approx(45)
    assert eta.update(2, step_seconds=1.0) == pytest.approx(40)  # 4 s went on an evaluation
    assert eta.update(10, step_seconds=1.0) == 0
    times = _clock(0.0, 3.0)
    eta = Eta(total_steps=3, clock=lambda: next(times))
    assert eta.update(1, step_seconds=None) is None
    assert eta.update(2, step_seconds=None) == pytest.approx(3)


def test_running_mean_is_exact_from_the_first_value() -> None:
    mean = Smoothed(keep=0.5)
    assert mean.add(8.0) == 8.0
    assert mean.add(2.0) == pytest.approx((0.5 * 8 + 2) / 1.5)


def test_memory_peak_is_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        ru_maxrss = 3000

    monkeypatch.setattr("resource.getrusage", lambda who: Usage)
    monkeypatch.setattr(sys, "platform", "linux")
    assert memory_peak_bytes("cpu") == 3000 * 1024
    monkeypatch.setattr(sys, "platform", "darwin")
    assert memory_peak_bytes("cpu") == 3000
