"""The all-gather schedule: every rank collects the K/V that it needs, some KV heads at a time (Llama 3, arXiv
2407.21783, section 3.3.2; `llama3` of ring-flash-attention).

While one group of heads is computed, the next one is on its way. Memory is bounded by two groups of the whole
sequence's K/V. Gradients go straight back to their owner, which adds them in rank order. A rank receives only the
tokens that it needs, so under a window this is a halo exchange.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from longctx.kernels.merge import accumulator_dtype
from longctx.parallel.needs import Needs
from longctx.parallel.schedule import Attend, AttendBackward, AttendQueries, KvHeads, Rows, Sent, Shape
from longctx.parallel.teams import Teams, single_ranks
from longctx.parallel.transport import Exchange, Transport

Gathered = dict[int, tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class AllGather:
    """Collect, compute, next heads.

    Attributes:
        gather_heads: KV heads that are collected at a time.
    """

    name: str = "all_gather"
    lockstep: bool = False
    gather_heads: int = 1

    def teams(self, cp: int) -> Teams:
        """Return teams of one."""
        return single_ranks(cp)

    def check(self, cp: int, *, heads: int, kv_heads: int) -> None:
        """Refuse a group of heads that is larger than all of them."""
        if not 1 <= self.gather_heads <= kv_heads:
            raise ValueError(
                f"attention.gather_heads={self.gather_heads} (KV heads collected at a time) must be between 1 and "
                f"model.num_kv_heads={kv_heads}"
            )

    def order(self, team: int, count: int) -> tuple[int, ...]:
        """Return the own shard, then the others; all are there at once."""
        return tuple((team + hop) % count for hop in range(count))

    def moves_queries(self, shape: Shape) -> bool:
        """Say no: K/V are collected in both passes."""
        return False

    def sent(self, team: int, needs: Needs, shape: Shape) -> tuple[Sent, Sent]:
        """Count what others need of the own shard, twice, and the gradients of what is needed of theirs."""
        others = [peer for peer in range(len(needs.keys)) if peer != team]
        given = {peer: span[1] - span[0] for peer in others if (span := needs.keys[peer][team]) is not None}
        taken = {peer: span[1] - span[0] for peer in others if (span := needs.keys[team][peer]) is not None}
        low, wide = shape.kv_token_bytes
        hops = len(self._groups(shape.kv_heads)) if given or taken else 0
        forward = Sent(hops, {peer: tokens * low for peer, tokens in given.items()})
        peers = sorted({*given, *taken})
        return forward, Sent(2 * hops, {p: given.get(p, 0) * low + taken.get(p, 0) * wide for p in peers})

    def kv_bytes(self, needs: Needs, shape: Shape) -> int:
        """Count what all need of each other twice, and its gradients."""
        table = [(team, peer, span) for team, row in enumerate(needs.keys) for peer, span in enumerate(row)]
        tokens = sum(span[1] - span[0] for team, peer, span in table if span is not None and peer != team)
        low, wide = shape.kv_token_bytes
        return tokens * (2 * low + wide)

    def forward(self, ring: Transport, needs: Needs, k: Tensor, v: Tensor, *, attend: Attend) -> None:
        """Collect the needed K/V of each group of heads and attend to it."""
        for heads, gathered in self._collected(ring, needs, k, v):
            for source in self.order(ring.rank, ring.size):
                if source in gathered:
                    attend(source, heads, *gathered.pop(source))

    def backward(
        self, ring: Transport, needs: Needs, k: Tensor, v: Tensor, *, attend: AttendBackward
    ) -> tuple[Tensor, Tensor]:
        """Collect again, and send each owner its gradients in the accumulators' dtype."""
        wide = accumulator_dtype(k.dtype)
        dk, dv = torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)

        def back(heads: KvHeads, gathered: Gathered) -> None:
            parts: Gathered = {}
            for source in self.order(ring.rank, ring.size):
                if source in gathered:
                    parts[source] = attend(source, heads, *gathered.pop(source))
            mine = {ring.rank: parts.pop(ring.rank)} if ring.rank in parts else {}
            spans = {peer: needs.keys[peer][ring.rank] for peer in range(ring.size)}
            coming: Gathered = {}
            for peer, span in spans.items():
                if peer != ring.rank and span is not None:
                    coming[peer] = _buffers(k, v, span, heads, dtype=wide)
            if parts or coming:
                ring.exchange(parts, coming).wait()
            for peer, (dk_part, dv_part) in sorted({**coming, **mine}.items()):
                span = spans[peer]
                assert span is not None
                dk[:, slice(*span), slice(*heads)] += dk_part
                dv[:, slice(*span), slice(*heads)] += dv_part

        for heads, gathered in self._collected(ring, needs, k, v):
            back(heads, gathered)
        return dk, dv

    def backward_queries(
        self, ring: Transport, needs: Needs, rows: Rows, *, attend: AttendQueries, wide: torch.dtype
    ) -> Tensor:
        """Never called: `moves_queries` says no."""
        raise AssertionError(self)

    def _collected(self, ring: Transport, needs: Needs, k: Tensor, v: Tensor) -> Iterator[tuple[KvHeads, Gathered]]:
        """Yield each group of heads with the needed K/V of all shards, which the taker takes out: when it comes back
        for the next group, that of the one after is asked for."""
        groups = self._groups(k.shape[2])
        arriving = _collect(ring, needs, k, v, groups[0])
        for index, heads in enumerate(groups):
            exchange, gathered = arriving
            if exchange is not None:
                exchange.wait()
            if index + 1 < len(groups):
                arriving = _collect(ring, needs, k, v, groups[index + 1])
            yield heads, gathered

    def _groups(self, kv_heads: int) -> list[KvHeads]:
        step = self.gather_heads
        return [(first, min(first + step, kv_heads)) for first in range(0, kv_heads, step)]


def _collect(ring: Transport, needs: Needs, k: Tensor, v: Tensor, heads: KvHeads) -> tuple[Exchange | None, Gathered]:
    """Post the exchange that brings the needed tokens of all shards; the own ones are views."""
    outgoing, gathered = {}, {}
    for peer in range(ring.size):
        wanted, given = needs.keys[ring.rank][peer], needs.keys[peer][ring.rank]
        if peer == ring.rank:
            if wanted is not None:
                gathered[peer] = k[:, slice(*wanted), slice(*heads)], v[:, slice(*wanted), slice(*heads)]
            continue
        if given is not None:
            outgoing[peer] = k[:, slice(*given), slice(*heads)], v[:, slice(*given), slice(*heads)]
        if wanted is not None:
            gathered[peer] = _buffers(k, v, wanted, heads, dtype=k.dtype)
    incoming = {peer: tensors for peer, tensors in gathered.items() if peer != ring.rank}
    if not outgoing and not incoming:
        return None, gathered
    return ring.exchange(outgoing, incoming), gathered


def _buffers(
    k: Tensor, v: Tensor, span: tuple[int, int], heads: KvHeads, *, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    shape = k.shape[0], span[1] - span[0], heads[1] - heads[0]
    return k.new_empty((*shape, k.shape[3]), dtype=dtype), v.new_empty((*shape, v.shape[3]), dtype=dtype)
