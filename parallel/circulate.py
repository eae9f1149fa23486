"""Send shards round a circuit, compute with each as it passes, and bring the sums home. It never sees a mask.

Every exchange is posted before the arithmetic that it can hide behind, and waited for after it. Messages carry no tags:
both ends post them in the order of the steps.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longctx.parallel.circuit import FAR, NEAR, Message, steps
from longctx.parallel.needs import Span, Table
from longctx.parallel.transport import Exchange, Transport

Shard = tuple[Tensor, ...]
Visit = Callable[[int, Shard], Shard | None]


@dataclass(slots=True)
class _Part:
    """Some tokens of a shard or of its sums; with an exchange, they are still on their way."""

    span: Span
    tensors: Shard
    exchange: Exchange | None = None

    def arrived(self) -> "_Part":
        if self.exchange is not None:
            self.exchange.wait()
            self.exchange = None
        return self

    def cut(self, span: Span) -> Shard:
        """Return the tokens `span`, as views."""
        return tuple(tensor[:, span[0] - self.span[0] : span[1] - self.span[0]] for tensor in self.tensors)


def circulate(
    transport: Transport, wanted: Table, shard: Shard, *, inner: int, visit: Visit, like: Shard = ()
) -> Shard:
    """Bring every rank's shard past every rank that wants it.

    Args:
        transport: the ring; ranks with equal `rank // inner` are neighbours on an inner ring.
        wanted: `wanted[rank][source]`: the tokens of a source's shard that a rank computes with.
        inner: ranks of an inner ring; the transport's size for a plain ring.
        shard: this rank's tensors, all `[B, T, ...]`.
        visit: `(source, tensors cut to the wanted tokens) -> what it adds to the sums of those tokens`, or None
            without sums. Called once for every wanted shard, the own one first.
        like: tensors on any device whose shapes after `[B, T]` and dtypes the sums have; none if there are no sums.

    Returns:
        The sums for this rank's own shard, over all ranks: as many tensors as `like`.
    """
    device, whole = shard[0].device, (0, shard[0].shape[1])
    here: dict[int, _Part] = {transport.rank: _Part(whole, shard)}  # by source
    sums: dict[int, _Part] = {}  # of shards that are still to come, by source
    own: list[_Part] = []
    posted: list[tuple[int, Exchange]] = []  # with the time by which they are done

    def post(
        sent: Sequence[tuple[Message, Shard]], received: Sequence[tuple[Message, _Part]], *, lane: int, done: int
    ) -> None:
        if not sent and not received:
            return
        outgoing: dict[int, list[Tensor]] = {}
        incoming: dict[int, list[Tensor]] = {}
        for message, tensors in sent:
            outgoing.setdefault(message.peer, []).extend(tensors)
        for message, part in received:
            incoming.setdefault(message.peer, []).extend(part.tensors)
        exchange = transport.exchange(outgoing, incoming, lane=lane)
        for _, part in received:
            part.exchange = exchange
        posted.append((done, exchange))

    for time, step in enumerate(steps(transport.rank, wanted, inner)):
        for _, exchange in [entry for entry in posted if entry[0] <= time]:
            exchange.wait()  # frees what was sent
        posted = [entry for entry in posted if entry[0] > time]
        for lane in (NEAR, FAR):
            coming = [(m, _Part(m.span, _empty(shard, m.span, device))) for m in step.received[lane]]
            # Arrived: an exchange is waited for when the last of its shards is due; an earlier one may go on now.
            leaving = [(m, here[m.source].arrived().cut(m.span)) for m in step.sent[lane]]
            post(leaving, coming, lane=lane, done=max((m.due for m, _ in (*leaving, *coming)), default=0))
            here.update({message.source: part for message, part in coming})
        mine: list[_Part] = []
        if step.needed is not None:
            added = visit(step.source, here[step.source].arrived().cut(step.needed))
            if added is not None:
                mine.append(_Part(step.needed, added))
        for source in step.released:
            here.pop(source, None)
        if not like:
            continue
        if time == 0:
            own = mine
            continue
        leaving = []
        if step.sums_sent is not None:
            before = [sums.pop(step.source)] if step.source in sums else []
            leaving.append((step.sums_sent, _sum([*before, *mine], step.sums_sent.span, like, device)))
        coming = [(m, _Part(m.span, _empty(like, m.span, device))) for m in step.sums_received]
        post(leaving, coming, lane=NEAR, done=time + 2)
        for message, part in coming:
            if message.source == transport.rank:
                own.append(part)
            else:
                sums[message.source] = part
    for _, exchange in posted:
        exchange.wait()
    return _sum(own, whole, like, device)


def _empty(like: Sequence[Tensor], span: Span, device: torch.device) -> Shard:
    tokens = span[1] - span[0]
    return tuple(torch.empty((t.shape[0], tokens, *t.shape[2:]), dtype=t.dtype, device=device) for t in like)


def _sum(parts: Sequence[_Part], span: Span, like: Shard, device: torch.device) -> Shard:
    """Add parts that cover some of `span`, in order; where one covers all of it, in its own memory."""
    parts = [part.arrived() for part in parts]
    base = next((part for part in parts if part.span == span), None)
    sums = base.tensors if base is not None else tuple(tensor.zero_() for tensor in _empty(like, span, device))
    for part in parts:
        if part is not base:
            for total, tensor in zip(sums, part.tensors, strict=True):
                total[:, part.span[0] - span[0] : part.span[1] - span[0]] += tensor
    return sums
