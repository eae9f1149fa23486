"""Move tensors between the ranks of a context-parallel group, and count what moves.

A transport is all that a schedule knows about the other ranks. `ProcessGroupTransport` talks to real ranks; the
loopback transport (`loopback.py`) simulates N ranks in one process with the same calls.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol
from weakref import WeakSet

import torch
import torch.distributed as dist

# Now, and not by `torch.optim` when there is a default group already: defaults of its functions would hold the group.
import torch.distributed.nn.functional
from torch import Tensor

Parcels = Mapping[int, Sequence[Tensor]]

# Groups of nccl whose ranks know each other. Weakly: a group that something holds until the interpreter ends keeps its
# threads, and gloo's then abort the process now and then ("terminate called without an active exception").
_connected: WeakSet[dist.ProcessGroup] = WeakSet()


@dataclass(slots=True)
class Traffic:
    """What one rank has exchanged.

    Attributes:
        hops: exchanges that this rank took part in, as sender or receiver.
        bytes: bytes sent.
        bytes_to: bytes sent to each peer.
    """

    hops: int = 0
    bytes: int = 0
    bytes_to: dict[int, int] = field(default_factory=dict)

    def add(self, outgoing: Parcels) -> None:
        """Count one exchange."""
        self.hops += 1
        for peer, tensors in outgoing.items():
            sent = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            self.bytes += sent
            self.bytes_to[peer] = self.bytes_to.get(peer, 0) + sent


class Exchange(Protocol):
    """An exchange under way: posted, not yet waited for."""

    def wait(self) -> None:
        """Return when the incoming tensors are filled and the outgoing ones may be written again."""
        ...


class Transport(Protocol):
    """One rank's view of a group."""

    rank: int
    size: int
    traffic: Traffic

    def exchange(self, outgoing: Parcels, incoming: Parcels, *, lane: int = 0) -> Exchange:
        """Post one hop: send `outgoing[peer]` to each peer and fill `incoming[peer]` from each peer.

        Both ends post the exchanges of a lane in the same order, with the same shapes and dtypes; a rank that neither
        sends nor receives posts nothing. Nobody writes to the tensors until the exchange was waited for.

        Args:
            outgoing, incoming: tensors by peer, any strides; never empty lists.
            lane: exchanges of different lanes may overtake each other.
        """
        ...


class ProcessGroupTransport:
    """Hops over `torch.distributed` point-to-point calls."""

    def __init__(self, group: dist.ProcessGroup, *, far_group: dist.ProcessGroup | None = None) -> None:
        """Wrap a group (collective over it where the backend is nccl and the group is new).

        Args:
            group: the context-parallel group.
            far_group: another group of the same ranks for lane 1, whose slow hops between machines then overlap with
                those of lane 0 on nccl, which runs the calls of one group one after the other.
        """
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self.traffic = Traffic()
        self._lanes = (group, far_group or group)
        for each in self._lanes:
            if self.size > 1 and each not in _connected and dist.get_backend(each) == "nccl":
                # nccl hangs if the first point-to-point call of a group does not involve all of its ranks.
                dist.all_reduce(torch.zeros(1, device=torch.device("cuda", torch.cuda.current_device())), group=each)
                _connected.add(each)

    def exchange(self, outgoing: Parcels, incoming: Parcels, *, lane: int = 0) -> Exchange:
        group = self._lanes[lane]
        sent = [(peer, tensor.contiguous()) for peer, tensors in outgoing.items() for tensor in tensors]
        received = [(peer, tensor) for peer, tensors in incoming.items() for tensor in tensors]
        assert all(tensor.is_contiguous() for _, tensor in received), "incoming tensors must be contiguous"
        operations = [dist.P2POp(dist.isend, tensor, group=group, group_peer=peer) for peer, tensor in sent]
        operations += [dist.P2POp(dist.irecv, tensor, group=group, group_peer=peer) for peer, tensor in received]
        assert operations, "an exchange without any message"
        self.traffic.add(outgoing)
        return _ProcessGroupExchange(dist.batch_isend_irecv(operations), sent)


class _ProcessGroupExchange:
    def __init__(self, works: list[dist.Work], sent: list[tuple[int, Tensor]]) -> None:
        self._works = works
        self._sent = sent  # must outlive the send

    def wait(self) -> None:
        for work in self._works:
            work.wait()
        self._works, self._sent = [], []


class Among:
    """Some ranks of a transport as a group of their own, in the order given; traffic is counted by the whole."""

    def __init__(self, whole: Transport, ranks: Sequence[int]) -> None:
        self.rank = list(ranks).index(whole.rank)
        self.size = len(ranks)
        self.traffic = whole.traffic
        self._whole = whole
        self._ranks = tuple(ranks)

    def exchange(self, outgoing: Parcels, incoming: Parcels, *, lane: int = 0) -> Exchange:
        ranks = self._ranks
        return self._whole.exchange(
            {ranks[peer]: tensors for peer, tensors in outgoing.items()},
            {ranks[peer]: tensors for peer, tensors in incoming.items()},
            lane=lane,
        )


class Alone:
    """A group of one rank, without a process group: there is nobody to exchange with."""

    def __init__(self) -> None:
        self.rank, self.size = 0, 1
        self.traffic = Traffic()

    def exchange(self, outgoing: Parcels, incoming: Parcels, *, lane: int = 0) -> Exchange:
        raise AssertionError("a group of one rank has nothing to exchange")
