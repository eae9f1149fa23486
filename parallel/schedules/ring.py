"""The ring schedule: K/V shards travel around the group, one hop per shard. It never sees a mask.

Ring Attention (Liu et al., arXiv 2310.01889). Forward makes cp - 1 hops of (k, v); backward cp - 1 hops of (k, v) and
cp hops of (dk, dv), which travel one hop behind the shard that they belong to and end at its owner. Messages carry no
tags: every rank sends kv 1, dkv 0, kv 2, dkv 1, ..., and receives in that order. Every exchange is posted before the
kernel runs and waited for after it, so transfers hide behind arithmetic where the hardware allows.
"""

from dataclasses import dataclass

from torch import Tensor

from longctx.parallel.schedule import Attend, AttendBackward
from longctx.parallel.transport import Exchange, Transport


@dataclass(frozen=True)
class Ring:
    """Send to the next rank, receive from the one before."""

    name: str = "ring"
    distributed: bool = True

    def sources(self, rank: int, size: int) -> tuple[int, ...]:
        """Return whose shard is at `rank` at each hop; hop 0 is its own."""
        return tuple((rank - hop) % size for hop in range(size))

    def forward(self, transport: Transport, k: Tensor, v: Tensor, *, attend: Attend) -> None:
        """Call `attend(source, k, v)` once for every rank's shard."""
        sources = self.sources(transport.rank, transport.size)
        for source in sources:
            arriving = transport.shift((k, v)) if source != sources[-1] else None
            attend(source, k, v)
            if arriving is not None:
                k, v = arriving.wait()

    def backward(self, transport: Transport, k: Tensor, v: Tensor, *, attend: AttendBackward) -> tuple[Tensor, Tensor]:
        """Call `attend(source, k, v) -> (dk, dv)` for every shard; return the summed gradients of the own one.

        Gradients travel in the dtype that `attend` returns (float32: see the numerical contract).
        """
        sources = self.sources(transport.rank, transport.size)
        travelling: Exchange | None = None
        dk = dv = None
        for source in sources:
            arriving = transport.shift((k, v)) if source != sources[-1] else None
            dk, dv = attend(source, k, v)
            if travelling is not None:
                dk_before, dv_before = travelling.wait()
                dk += dk_before
                dv += dv_before
            if transport.size > 1:
                travelling = transport.shift((dk, dv))
            if arriving is not None:
                k, v = arriving.wait()
        if travelling is not None:
            dk, dv = travelling.wait()
        assert dk is not None and dv is not None
        return dk, dv
