"""What a communication schedule is: whose K/V arrives when. It never sees a mask."""

from collections.abc import Callable, Hashable
from typing import Protocol

from torch import Tensor

from longctx.parallel.transport import Transport

Attend = Callable[[int, Tensor, Tensor], None]
AttendBackward = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]


class Schedule(Hashable, Protocol):
    """Bring every rank's K/V shard past every rank, and the gradients home. A value: equal names, equal behaviour."""

    @property
    def name(self) -> str: ...

    @property
    def distributed(self) -> bool:
        """Tell whether it can share a sequence between ranks."""
        ...

    def sources(self, rank: int, size: int) -> tuple[int, ...]:
        """Return whose K/V shard is at `rank` at each hop."""
        ...

    def forward(self, transport: Transport, k: Tensor, v: Tensor, *, attend: Attend) -> None:
        """Call `attend(source, k, v)` once per shard, in the order of `sources`."""
        ...

    def backward(self, transport: Transport, k: Tensor, v: Tensor, *, attend: AttendBackward) -> tuple[Tensor, Tensor]:
        """Call `attend(source, k, v) -> (dk, dv)` once per shard; return the own shard's, summed over ranks."""
        ...
