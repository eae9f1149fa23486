"""Time steps on a device: CUDA events there, the wall clock on a CPU (where only smoke tests run)."""

import time
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any, Protocol

import torch
from _ranks import environment


class Steps(Protocol):
    """One pass after the other."""

    def forward(self) -> None: ...

    def backward(self) -> None: ...


Clock = Callable[[tuple[Callable[[], None], ...]], list[float]]


def clock(device: torch.device) -> Clock:
    """Return what runs some steps and says how many milliseconds each took on the device."""

    def by_events(steps: tuple[Callable[[], None], ...]) -> list[float]:
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(steps) + 1)]
        marks[0].record()
        for step, mark in zip(steps, marks[1:], strict=True):
            step()
            mark.record()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) for a, b in pairwise(marks)]

    def by_hand(steps: tuple[Callable[[], None], ...]) -> list[float]:
        times = []
        for step in steps:
            started = time.perf_counter()
            step()
            times.append(1e3 * (time.perf_counter() - started))
        return times

    return by_hand if device.type == "cpu" else by_events


def timed(passes: Mapping[str, Steps], measured: Clock, *, warm_up: int, rounds: int) -> dict[str, list[list[float]]]:
    """Return [forward, backward] milliseconds of every round after the warm-up; the columns take turns."""
    times: dict[str, list[list[float]]] = {column: [] for column in passes}
    for turn in range(warm_up + rounds):
        for column, one in passes.items():
            taken = measured((one.forward, one.backward))
            if turn >= warm_up:
                times[column].append(taken)
    return times


def surroundings(device: torch.device, *packages: str) -> dict[str, Any]:
    """Say what this was measured on."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU: a smoke test, no measurement"
    return {"device": name, **environment("triton", *packages)}
