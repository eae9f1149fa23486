"""The one place where Triton kernels are launched, so that launches can be recorded instead of run.

Recording is how kernels are compiled for architectures that are not there (`offline.py`): an op runs on small tensors
of any device, no kernel runs, and what would have been launched is known to the last argument.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch


@dataclass(frozen=True)
class Launch:
    """One launch: Triton's function, its grid, its arguments by name, `num_warps` and `num_stages`."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    warps: int
    stages: int


_record: ContextVar[list[Launch] | None] = ContextVar("record", default=None)


def launch(kernel: Any, grid: tuple[int, ...], arguments: Mapping[str, Any], *, warps: int, stages: int) -> None:
    """Launch a Triton kernel on the device of its tensors, or record the launch inside of `recorded`."""
    record = _record.get()
    if record is not None:
        record.append(Launch(kernel, grid, dict(arguments), warps, stages))
        return
    tensor = next(x for x in arguments.values() if isinstance(x, torch.Tensor))
    with torch.cuda.device_of(tensor):  # Triton launches on the current device
        kernel[grid](**arguments, num_warps=warps, num_stages=stages)


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Record launches instead of running them; what they would have written stays as it was allocated."""
    launches: list[Launch] = []
    token = _record.set(launches)
    try:
        yield launches
    finally:
        _record.reset(token)


def reason_not_to_run(device_type: str) -> str | None:
    """Return why no Triton kernel can run on a kind of device, or None where one can."""
    if find_spec("triton") is None:
        return "triton is not installed"
    import triton

    if device_type != "cuda" and not triton.knobs.runtime.interpret:
        return f"it runs on CUDA devices, and on the CPU under Triton's interpreter only; given {device_type}"
    return None


def cdiv(total: int, size: int) -> int:
    """Return how many blocks of `size` hold `total`."""
    return -(-total // size)
