"""Make the ranks agree: on a value of rank 0, on failure, on equality. Over a group of its own, and patiently."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from types import TracebackType
from typing import Self, TypeVar

import torch.distributed as dist

T = TypeVar("T")

# The longest that ranks may be apart, while one prepares a corpus or writes to slow storage. A rank that dies is
# noticed at once by its closed connections; this is only for one that stalls.
PATIENCE = timedelta(hours=12)


class Ranks:
    """All ranks over a gloo group of their own, usable from a background thread beside the training's groups."""

    def __init__(self) -> None:
        """Create the group (collective over all ranks)."""
        assert dist.is_initialized(), "init_process_group comes first"
        self.group = dist.new_group(backend="gloo", timeout=PATIENCE)
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()

    @property
    def first(self) -> bool:
        """Tell whether this is rank 0, which decides and reports."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Return every rank's picklable value, in rank order, on every rank (collective)."""
        values: list[T | None] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values  # type: ignore[return-value]

    def from_first(self, decide: Callable[[], T]) -> T:
        """Run `decide` on rank 0 and return its picklable result on every rank (collective).

        An exception of `decide` is raised on every rank.
        """
        box: list[object] = [None, None]
        if self.first:
            try:
                box[0] = decide()
            except Exception as error:
                box[1] = error
        dist.broadcast_object_list(box, src=0, group=self.group)
        if isinstance(box[1], BaseException):
            raise box[1]
        return box[0]  # type: ignore[return-value]

    def all_succeed(self, compute: Callable[[], T]) -> T:
        """Run `compute` on every rank; a ValueError on any rank is raised on all (collective)."""
        value, problem = None, None
        try:
            value = compute()
        except ValueError as error:
            problem = str(error)
        for rank, text in enumerate(self.gather(problem)):
            if text is not None:
                raise ValueError(text if problem == text else f"rank {rank}: {text}")
        return value  # type: ignore[return-value]

    def check_equal(self, digest: str, *, what: str) -> None:
        """Raise ValueError on every rank where the ranks' digests differ (collective)."""
        digests = self.gather(digest)
        different = [rank for rank, other in enumerate(digests) if other != digests[0]]
        if different:
            raise ValueError(
                f"{what} on rank(s) {different} differs from rank 0's: start every rank with the same arguments"
            )

    def close(self) -> None:
        """Give the group back."""
        if dist.is_initialized():
            dist.destroy_process_group(self.group)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
