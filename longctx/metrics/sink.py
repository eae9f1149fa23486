"""Send numbers to other programs (TensorBoard, wandb) without ever letting them stop the training."""

from collections.abc import Callable, Mapping
from typing import Protocol


class Sink(Protocol):
    """A place that takes scalars. Its constructor may raise ValueError, with what the user can do about it."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take the metrics of one step."""
        ...

    def close(self) -> None:
        """Flush and stop."""
        ...


class GuardedSink:
    """Wrap a sink: its first error is reported, and after it the sink is left alone, as it may block each time."""

    def __init__(self, sink: Sink, *, name: str, report: Callable[[str], None]) -> None:
        """Wrap `sink`, which `name` stands for in what is given to `report`."""
        self._sink = sink
        self._name = name
        self._report = report
        self._alive = True

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take the metrics of one step; never raise."""
        self._try(lambda: self._sink.log(step, metrics))

    def close(self) -> None:
        """Flush and stop; never raise."""
        self._try(self._sink.close)
        self._alive = False

    def _try(self, action: Callable[[], None]) -> None:
        if not self._alive:
            return
        try:
            action()
        except Exception as error:
            self._alive = False
            self._report(
                f"warning: {self._name} stopped working ({type(error).__name__}: {error}); the run goes on without it, "
                "and metrics.jsonl still holds every step"
            )
