"""Time steps: tokens per second, share of the time spent waiting for data, MFU, memory peak, time to go."""

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from longctx.metrics.flops import mfu

Clock = Callable[[], float]


class Smoothed:
    """An exponential running mean, exact from the first value on (no pull towards 0)."""

    def __init__(self, *, keep: float = 0.9) -> None:
        """Keep the share `keep` of the old mean at each new value."""
        assert 0 <= keep < 1
        self._keep = keep
        self._sum = 0.0
        self._weight = 0.0

    def add(self, value: float) -> float:
        """Take in `value` and return the mean."""
        self._sum = self._keep * self._sum + (1 - self._keep) * value
        self._weight = self._keep * self._weight + (1 - self._keep)
        return self._sum / self._weight


class Eta:
    """Estimate the time to go from the wall time between steps, which holds evaluation and checkpoints too."""

    def __init__(self, *, total_steps: int, clock: Clock = time.perf_counter) -> None:
        """Estimate for a run of `total_steps`."""
        self._total_steps = total_steps
        self._clock = clock
        self._last: float | None = None
        self._seconds_per_step = Smoothed()

    def update(self, step: int, *, step_seconds: float | None) -> float | None:
        """Return the seconds to go after `step`, or None if not known yet.

        `step_seconds` stands in for the time since the step before, at the first step, which has none.
        """
        now = self._clock()
        elapsed = step_seconds if self._last is None else now - self._last
        self._last = now
        if elapsed is None:
            return None
        return self._seconds_per_step.add(elapsed) * max(self._total_steps - step, 0)


def memory_peak_bytes(device_type: str) -> int:
    """Return this process's peak so far, in bytes: allocated on the GPU for "cuda", resident in RAM otherwise."""
    if device_type == "cuda":
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


class StepMeter:
    """Measure one optimizer step at a time.

        meter.begin()
        with meter.waiting_for_data():
            batch = next(batches)
        ...                                      # forward, backward, optimizer
        metrics = meter.end(tokens=..., model_flops=...)

    What lies outside begin() and end() (evaluation, checkpoints) is in no step. On a GPU the kernels run behind the
    host: read the loss, which waits for them, before end().
    """

    def __init__(
        self, *, world_size: int, device_type: str, peak_flops: float, clock: Clock = time.perf_counter
    ) -> None:
        """Measure for `world_size` ranks, one device of `peak_flops` FLOP/s each."""
        self._world_size = world_size
        self._device_type = device_type
        self._peak_flops = peak_flops
        self._clock = clock
        self._begin: float | None = None
        self._waited = 0.0

    def begin(self) -> None:
        """Start the step's clock."""
        self._waited = 0.0
        self._begin = self._clock()

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Count what runs inside as waiting for data. May be entered more than once in a step."""
        begin = self._clock()
        try:
            yield
        finally:
            self._waited += self._clock() - begin

    def end(self, *, tokens: int, model_flops: float) -> dict[str, float]:
        """Stop the clock and return the step's metrics; `tokens` and `model_flops` are sums over all ranks."""
        assert self._begin is not None, "end() without begin()"
        seconds = max(self._clock() - self._begin, 1e-9)
        self._begin = None
        return {
            "step_seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "tokens_per_second_per_rank": tokens / seconds / self._world_size,
            "data_wait_share": self._waited / seconds,
            "mfu": mfu(model_flops=model_flops, seconds=seconds, num_devices=self._world_size, peak=self._peak_flops),
            "memory_peak_bytes": memory_peak_bytes(self._device_type),
        }
