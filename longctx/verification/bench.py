"""Where checks run: on simulated ranks in this process, or on the real ones."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from longctx.parallel.loopback import run_ranks
from longctx.parallel.transport import Transport

Result = TypeVar("Result")


class Bench(Protocol):
    """The ranks of one context-parallel group."""

    @property
    def size(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    def run(self, function: Callable[[Transport], Result]) -> list[Result]:
        """Run `function(transport)` on every rank and return all results, tensors on the CPU, in rank order."""
        ...


@dataclass(frozen=True)
class SimulatedRanks:
    """Ranks that are threads of this process."""

    size: int
    device: torch.device

    def run(self, function: Callable[[Transport], Result]) -> list[Result]:
        return [_on_cpu(result) for result in run_ranks(self.size, function)]


@dataclass(frozen=True)
class RealRanks:
    """The ranks of a process group.

    Attributes:
        transport: over the context-parallel group.
        gatherer: a gloo group of the same ranks, for results; impatient, since a rank that failed may be waited for.
    """

    transport: Transport
    gatherer: dist.ProcessGroup
    device: torch.device

    @property
    def size(self) -> int:
        return self.transport.size

    def run(self, function: Callable[[Transport], Result]) -> list[Result]:
        result: Any = None
        problem: str | None = None
        try:
            result = _on_cpu(function(self.transport))
        except Exception as error:  # the others must hear of it
            problem = f"{type(error).__name__}: {error}"
            # They may wait for a message of this rank, and never come to where they would hear of it.
            print(f"rank {self.transport.rank} of the cp group raised {problem}", file=sys.stderr, flush=True)
        results: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(results, (result, problem), group=self.gatherer)
        except RuntimeError:
            if problem is not None:
                raise SystemExit(1) from None  # the launcher then ends the ranks that wait
            raise
        problems = {rank: problem for rank, (_, problem) in enumerate(results) if problem is not None}
        if problems:
            raise RuntimeError("; ".join(f"cp rank {rank}: {text}" for rank, text in problems.items()))
        return [value for value, _ in results]


def _on_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {key: _on_cpu(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_on_cpu(each) for each in value)
    return value
