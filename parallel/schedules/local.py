"""The local schedule: one rank holds the whole sequence and nothing moves."""

from dataclasses import dataclass

from torch import Tensor

from longctx.parallel.schedule import Attend, AttendBackward
from longctx.parallel.transport import Transport


@dataclass(frozen=True)
class Local:
    """No hop at all; needs a group of one."""

    name: str = "local"
    distributed: bool = False

    def sources(self, rank: int, size: int) -> tuple[int, ...]:
        """Return the only shard there is."""
        assert size == 1 and rank == 0, (rank, size)
        return (0,)

    def forward(self, transport: Transport, k: Tensor, v: Tensor, *, attend: Attend) -> None:
        """Attend to the own shard."""
        attend(0, k, v)

    def backward(self, transport: Transport, k: Tensor, v: Tensor, *, attend: AttendBackward) -> tuple[Tensor, Tensor]:
        """Return the gradients of the own shard."""
        return attend(0, k, v)
