"""Move tensors between the ranks of a context-parallel group, and count what moves.

A transport is all that a schedule knows about the other ranks. `ProcessGroupTransport` talks to real ranks; the
loopback transport (`loopback.py`) simulates N ranks in one process with the same calls.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(slots=True)
class Traffic:
    """What one rank has sent."""

    hops: int = 0
    bytes: int = 0

    def add(self, tensors: Sequence[Tensor]) -> None:
        self.hops += 1
        self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class Exchange(Protocol):
    """An exchange under way: posted, not yet waited for."""

    def wait(self) -> tuple[Tensor, ...]:
        """Return the received tensors."""
        ...


class Transport(Protocol):
    """One rank's view of a group."""

    rank: int
    size: int
    traffic: Traffic

    def shift(self, tensors: Sequence[Tensor]) -> Exchange:
        """Post one hop: send `tensors` to rank + 1 and receive the same shapes from rank - 1 (both modulo size).

        The caller must not write to `tensors` until the exchange was waited for.
        """
        ...


class ProcessGroupTransport:
    """Hops over `torch.distributed` point-to-point calls; all ranks of the group make the same calls in order."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self.traffic = Traffic()
        self._group = group

    def shift(self, tensors: Sequence[Tensor]) -> Exchange:
        outgoing = [tensor.contiguous() for tensor in tensors]
        incoming = [torch.empty_like(tensor) for tensor in outgoing]
        to, source = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        operations = [dist.P2POp(dist.isend, t, group=self._group, group_peer=to) for t in outgoing]
        operations += [dist.P2POp(dist.irecv, t, group=self._group, group_peer=source) for t in incoming]
        self.traffic.add(outgoing)
        return _ProcessGroupExchange(dist.batch_isend_irecv(operations), outgoing, incoming)


class _ProcessGroupExchange:
    def __init__(self, works: list[dist.Work], outgoing: list[Tensor], incoming: list[Tensor]) -> None:
        self._works = works
        self._outgoing = outgoing  # must outlive the send
        self._incoming = incoming

    def wait(self) -> tuple[Tensor, ...]:
        for work in self._works:
            work.wait()
        self._works, self._outgoing = [], []
        return tuple(self._incoming)
