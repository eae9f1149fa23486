"""Speeds: how fast ranks compute and talk, as config gives them or as is usual for the kind of device.

Only predictions read them (`predict.py`); nothing that is computed depends on them. The defaults:

| key                         | cpu  | cuda | where it is from                                                         |
|-----------------------------|------|------|--------------------------------------------------------------------------|
| `parallel.local_gb_per_s`   | 1    | 300  | gloo over loopback, measured; NVLink 4: 450 each way on the data sheet   |
| `parallel.network_gb_per_s` | 1    | 45   | 10 Gbit/s Ethernet; a 400 Gbit/s adapter per GPU                         |
| `parallel.latency_us`       | 200  | 20   | gloo, measured; nccl point-to-point                                      |
| `parallel.attention_tflops` | 0.1  | 100  | ATen flash on one core, measured; GPU: 0.4 of the data sheet where known |
| `parallel.call_us`          | 150  | 50   | one tile of the `torch` kernel and its merge, measured; a few launches   |
"""

import math
from dataclasses import dataclass
from typing import Protocol

KEYS = ("local_gb_per_s", "network_gb_per_s", "latency_us", "attention_tflops", "call_us")
DEFAULTS = {
    "cpu": (1.0, 1.0, 200.0, 0.1, 150.0),
    "cuda": (300.0, 45.0, 20.0, 100.0, 50.0),
}
SHARE_OF_PEAK = 0.4  # of a GPU's matmul peak that flash attention reaches, forward and backward


class SpeedConfig(Protocol):
    """The keys of `parallel` that are about speed; None = the default of the device."""

    @property
    def local_gb_per_s(self) -> float | None: ...
    @property
    def network_gb_per_s(self) -> float | None: ...
    @property
    def latency_us(self) -> float | None: ...
    @property
    def attention_tflops(self) -> float | None: ...
    @property
    def call_us(self) -> float | None: ...


@dataclass(frozen=True, kw_only=True)
class Speeds:
    """What predictions are made of, in SI units.

    Attributes:
        local, network: bytes/s that one rank sends, and at the same time receives, inside its machine and beyond.
        latency: seconds that an exchange takes without any bytes.
        flops: FLOP/s of attention on large tiles, forward and backward.
        call: seconds of a kernel call on top of its FLOPs.
        source: where they are from, in words.
    """

    local: float
    network: float
    latency: float
    flops: float
    call: float
    source: str = ""

    def describe(self) -> str:
        """Return one line."""
        return (
            f"{self.flops / 1e12:g} TFLOP/s, {self.call * 1e6:g} us per tile, {self.local / 1e9:g} GB/s in a machine, "
            f"{self.network / 1e9:g} GB/s between machines, {self.latency * 1e6:g} us per exchange ({self.source})"
        )


def check_speeds(config: SpeedConfig) -> None:
    """Refuse speeds that are none (ValueError); latency and calls may be free."""
    for key in KEYS:
        value = getattr(config, key)
        if value is None:
            continue
        free = key.endswith("_us")
        if not math.isfinite(value) or value < 0 or (value == 0 and not free):
            bound = ">= 0" if free else "> 0"
            raise ValueError(
                f"parallel.{key} must be finite and {bound}, or null for the device's usual; given {value}"
            )


def resolve_speeds(config: SpeedConfig, *, device_type: str, peak_flops: float | None = None) -> Speeds:
    """Return the speeds that config gives, and the device's usual ones for the rest.

    Args:
        peak_flops: the device's matmul peak, if it is known: attention is taken to reach 0.4 of it.
    """
    usual = dict(zip(KEYS, DEFAULTS.get(device_type, DEFAULTS["cpu"]), strict=True))
    if peak_flops is not None:
        usual["attention_tflops"] = SHARE_OF_PEAK * peak_flops / 1e12
    given = {key: getattr(config, key) for key in KEYS if getattr(config, key) is not None}
    value = {**usual, **given}
    names = ", ".join(f"parallel.{key}" for key in given)
    return Speeds(
        local=value["local_gb_per_s"] * 1e9,
        network=value["network_gb_per_s"] * 1e9,
        latency=value["latency_us"] / 1e6,
        flops=value["attention_tflops"] * 1e12,
        call=value["call_us"] / 1e6,
        source=f"{names} given, the rest usual for {device_type}" if given else f"usual for {device_type}",
    )
