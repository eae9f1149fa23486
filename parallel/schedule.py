"""What a communication schedule is: whose tokens arrive when. It never sees a mask."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from longctx.kernels.merge import accumulator_dtype
from longctx.parallel.needs import Needs
from longctx.parallel.teams import Teams
from longctx.parallel.transport import Transport

KvHeads = tuple[int, int]
Attend = Callable[[int, KvHeads, Tensor, Tensor], None]
AttendBackward = Callable[[int, KvHeads, Tensor, Tensor], tuple[Tensor, Tensor]]


class Rows(NamedTuple):
    """What a backward pass needs of queries: `q [B, T, H, D]`, `dout [B, T, H, Dv]`, `lse, delta [B, T, H]`."""

    q: Tensor
    dout: Tensor
    lse: Tensor
    delta: Tensor


AttendQueries = Callable[[int, Rows], Tensor]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What a schedule's costs depend on. `dtype` is that of q, k, v; sums travel in `wide`."""

    heads: int
    kv_heads: int
    head_dim: int
    v_head_dim: int
    dtype: torch.dtype

    @property
    def wide(self) -> torch.dtype:
        """Return the dtype of gradients on their way."""
        return accumulator_dtype(self.dtype)

    @property
    def kv_token_bytes(self) -> tuple[int, int]:
        """Return the bytes of one token's k and v, and of their gradients on their way."""
        both = self.kv_heads * (self.head_dim + self.v_head_dim)
        return both * self.dtype.itemsize, both * self.wide.itemsize


@dataclass(frozen=True)
class Sent:
    """What one rank sends in one pass.

    Attributes:
        hops: exchanges that it takes part in.
        bytes_to: bytes for each peer.
    """

    hops: int
    bytes_to: dict[int, int]

    @property
    def bytes(self) -> int:
        """Return the bytes for all peers."""
        return sum(self.bytes_to.values())


class Schedule(Hashable, Protocol):
    """Bring K/V past every rank that needs them, and the gradients home. A value: equal fields, equal behaviour.

    `ring` is the transport between teams (`teams.py`), `needs` what each team needs of each other one.
    """

    @property
    def name(self) -> str: ...

    @property
    def lockstep(self) -> bool:
        """Tell whether ranks wait for each other at every hop, rather than once per layer."""
        ...

    def teams(self, cp: int) -> Teams:
        """Return which ranks share heads rather than tokens.

        Raises:
            ValueError: a number of ranks that the schedule cannot arrange.
        """
        ...

    def check(self, cp: int, *, heads: int, kv_heads: int) -> None:
        """Refuse head counts that it cannot split (ValueError)."""
        ...

    def order(self, team: int, count: int) -> tuple[int, ...]:
        """Return whose shard is at a team at each hop, its own first."""
        ...

    def moves_queries(self, shape: Shape) -> bool:
        """Tell whether the backward pass sends queries round, and K/V stay (`backward` is not called then).

        `shape` has the heads of one rank.
        """
        ...

    def sent(self, team: int, needs: Needs, shape: Shape) -> tuple[Sent, Sent]:
        """Return what a rank of `team` sends to other teams in the forward and the backward pass, per row of a batch.

        Peers are teams. `shape` has the heads of one rank.
        """
        ...

    def kv_bytes(self, needs: Needs, shape: Shape) -> int:
        """Return the bytes of `sent` of a rank of each team together, in both passes, where K/V travel in both."""
        ...

    def forward(self, ring: Transport, needs: Needs, k: Tensor, v: Tensor, *, attend: Attend) -> None:
        """Call `attend(source, kv_heads, k, v)` with every needed part of every shard, for all KV heads.

        `k, v [B, tokens needed, heads of kv_heads, D]`: cut to `needs.keys[own][source]`.
        """
        ...

    def backward(
        self, ring: Transport, needs: Needs, k: Tensor, v: Tensor, *, attend: AttendBackward
    ) -> tuple[Tensor, Tensor]:
        """Call `attend(source, kv_heads, k, v) -> (dk, dv)` likewise; return the own shard's, summed over ranks."""
        ...

    def backward_queries(
        self, ring: Transport, needs: Needs, rows: Rows, *, attend: AttendQueries, wide: torch.dtype
    ) -> Tensor:
        """Call `attend(source, rows) -> dq` with the rows of every shard that see something of this one's keys.

        Returns dq of the own rows, summed over ranks, in dtype `wide`.
        """
        ...
