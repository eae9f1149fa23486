"""Schedules whose K/V shards travel from team to team: local, ring, double ring, Ulysses and USP are one mechanism.

`ring`: Ring Attention (Liu et al., arXiv 2310.01889). `double_ring`: LoongTrain (arXiv 2406.18485), BurstEngine.
`ulysses`: DeepSpeed-Ulysses (arXiv 2309.14509), a single team, so nothing travels between teams. `usp`: Ulysses inside
teams, a ring between them (arXiv 2405.07719). How shards go round is `circuit.py`; heads for tokens is `heads.py`.

The backward pass of each can send queries instead of K/V (BurstAttention, arXiv 2403.09347): `backward`.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from longctx.kernels.merge import accumulator_dtype
from longctx.parallel import circuit
from longctx.parallel.circulate import circulate
from longctx.parallel.needs import Needs
from longctx.parallel.schedule import Attend, AttendBackward, AttendQueries, Rows, Sent, Shape
from longctx.parallel.teams import Teams, neighbours, single_ranks, spread
from longctx.parallel.transport import Among, Transport

BackwardName = Literal["auto", "rotate_kv", "rotate_q"]
InnermostName = Literal["ulysses", "ring"]
CHOICES = {"backward": get_args(BackwardName), "innermost": get_args(InnermostName)}


def check_choice(option: str, value: str) -> None:
    """Refuse a value that an option of `CHOICES` does not have (ValueError)."""
    known = CHOICES[option]
    if value not in known:
        raise ValueError(f"attention.{option}={value} is not known; known are {', '.join(known)}")


@dataclass(frozen=True, kw_only=True)
class Ring:
    """Teams of one rank on one ring; the base of all schedules on a circuit.

    Attributes:
        backward_moves: what travels in the backward pass: `rotate_kv` (k, v, dk, dv), `rotate_q` (q, dout, delta, lse,
            dq), or `auto`: what sends fewer bytes. `attention.backward` in config.
    """

    name: str = "ring"
    lockstep: bool = True
    backward_moves: BackwardName = "auto"

    def __post_init__(self) -> None:
        check_choice("backward", self.backward_moves)

    def teams(self, cp: int) -> Teams:
        """Return teams of one."""
        return single_ranks(cp)

    def check(self, cp: int, *, heads: int, kv_heads: int) -> None:
        """Take any heads."""

    def inner(self, count: int) -> int:
        """Return how many teams are on an inner ring."""
        return count

    def order(self, team: int, count: int) -> tuple[int, ...]:
        """Return whose shard is at a team at each hop; hop 0 is its own."""
        return circuit.order(team, count, self.inner(count))

    def moves_queries(self, shape: Shape) -> bool:
        """Compare what one token costs per hop: k, v and dk, dv against q, dout, dq, delta and lse."""
        if self.backward_moves != "auto":
            return self.backward_moves == "rotate_q"
        low, wide = shape.dtype.itemsize, shape.wide.itemsize
        rotate_kv = sum(shape.kv_token_bytes)
        rotate_q = shape.heads * ((shape.head_dim + shape.v_head_dim) * low + 2 * wide + shape.head_dim * wide)
        return rotate_q < rotate_kv

    def sent(self, team: int, needs: Needs, shape: Shape) -> tuple[Sent, Sent]:
        """Count the messages of the circuit: k and v, or q, dout, lse and delta, and the sums that follow them."""
        inner, low, wide = self.inner(len(needs.keys)), shape.dtype.itemsize, shape.wide.itemsize
        both = shape.head_dim + shape.v_head_dim
        kv, kv_sums = shape.kv_token_bytes
        forward = circuit.sent(team, needs.keys, inner, payload=kv, sums=0)
        if self.moves_queries(shape):
            payload = shape.heads * (both * low + 2 * wide)
            sums = shape.heads * shape.head_dim * wide
            last, wanted = len(needs.keys) - 1, circuit.mirrored(needs.turned())
            hops, bytes_to = circuit.sent(last - team, wanted, inner, payload=payload, sums=sums)
            return Sent(*forward), Sent(hops, {last - peer: count for peer, count in bytes_to.items()})
        return Sent(*forward), Sent(*circuit.sent(team, needs.keys, inner, payload=kv, sums=kv_sums))

    def kv_bytes(self, needs: Needs, shape: Shape) -> int:
        """Count the shards of the circuit twice, and the sums."""
        shards, sums = circuit.moved(needs.keys, self.inner(len(needs.keys)))
        low, wide = shape.kv_token_bytes
        return 2 * shards * low + sums * wide

    def forward(self, ring: Transport, needs: Needs, k: Tensor, v: Tensor, *, attend: Attend) -> None:
        """Send (k, v) round."""
        heads = (0, k.shape[2])

        def visit(source: int, shard: tuple[Tensor, ...]) -> None:
            attend(source, heads, *shard)

        circulate(ring, needs.keys, (k, v), inner=self.inner(ring.size), visit=visit)

    def backward(
        self, ring: Transport, needs: Needs, k: Tensor, v: Tensor, *, attend: AttendBackward
    ) -> tuple[Tensor, Tensor]:
        """Send (k, v) round again, and (dk, dv) after them in the accumulators' dtype (the numerical contract)."""
        heads, wide = (0, k.shape[2]), accumulator_dtype(k.dtype)

        def visit(source: int, shard: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return attend(source, heads, *shard)

        like = tuple(x[:, :0].to(wide) for x in (k, v))
        dk, dv = circulate(ring, needs.keys, (k, v), inner=self.inner(ring.size), visit=visit, like=like)
        return dk, dv

    def backward_queries(
        self, ring: Transport, needs: Needs, rows: Rows, *, attend: AttendQueries, wide: torch.dtype
    ) -> Tensor:
        """Send (q, dout, lse, delta) round, and dq after them.

        The other way round: under a window a shard's keys are seen by the ranks after it, its queries see those before.
        """
        last = ring.size - 1

        def visit(source: int, shard: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (attend(last - source, Rows(*shard)),)

        back = Among(ring, range(last, -1, -1))
        wanted, like = circuit.mirrored(needs.turned()), (rows.q[:, :0].to(wide),)
        (dq,) = circulate(back, wanted, tuple(rows), inner=self.inner(ring.size), visit=visit, like=like)
        return dq


@dataclass(frozen=True, kw_only=True)
class Local(Ring):
    """No hop at all; needs a group of one."""

    name: str = "local"

    def teams(self, cp: int) -> Teams:
        """Return the only rank."""
        if cp != 1:
            raise ValueError(
                f"attention.schedule=local keeps a sequence on one rank; the group has {cp}. "
                "Use attention.schedule=ring"
            )
        return single_ranks(1)


@dataclass(frozen=True, kw_only=True)
class DoubleRing(Ring):
    """Rings of `ranks_per_ring` neighbours inside a ring of rings.

    Attributes:
        ranks_per_ring: ranks of an inner ring, such as those of one machine; divides cp. `attention.inner` in config.
    """

    name: str = "double_ring"
    ranks_per_ring: int = 1

    def teams(self, cp: int) -> Teams:
        """Return teams of one."""
        if self.ranks_per_ring < 1 or cp % self.ranks_per_ring:
            raise ValueError(
                f"attention.inner={self.ranks_per_ring} (ranks of an inner ring) must divide parallel.cp={cp}; "
                f"attention.schedule=double_ring can use {_divisors(cp)}, attention.schedule=ring needs none"
            )
        return single_ranks(cp)

    def inner(self, count: int) -> int:
        """Return the ranks of an inner ring."""
        return self.ranks_per_ring


@dataclass(frozen=True, kw_only=True)
class Ulysses(Ring):
    """All ranks share the heads of all tokens: two all-to-alls each way."""

    name: str = "ulysses"

    def teams(self, cp: int) -> Teams:
        """Return one team of all ranks."""
        return neighbours(cp, cp)

    def check(self, cp: int, *, heads: int, kv_heads: int) -> None:
        """Refuse query heads that the ranks cannot share evenly."""
        if heads % cp:
            raise ValueError(
                f"attention.schedule=ulysses splits the query heads over the ranks, so parallel.cp={cp} must divide "
                f"model.num_heads={heads}; use attention.schedule=usp with attention.ulysses one of "
                f"{_divisors(cp, heads)}, or attention.schedule=ring|double_ring|all_gather"
            )


@dataclass(frozen=True, kw_only=True)
class Usp(Ring):
    """Teams of `ulysses` ranks share heads; K/V travel from team to team.

    Attributes:
        ulysses: ranks of a team; divides cp and the query heads.
        innermost: whether neighbouring ranks form a team (`ulysses`) or a ring (`ring`).
    """

    name: str = "usp"
    ulysses: int = 1
    innermost: InnermostName = "ulysses"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("innermost", self.innermost)

    def teams(self, cp: int) -> Teams:
        """Return cp / ulysses teams."""
        if self.ulysses < 1 or cp % self.ulysses:
            raise ValueError(
                f"attention.ulysses={self.ulysses} (ranks that share heads) must divide parallel.cp={cp}; "
                f"attention.schedule=usp can use {_divisors(cp)}"
            )
        return neighbours(cp, self.ulysses) if self.innermost == "ulysses" else spread(cp, self.ulysses)

    def check(self, cp: int, *, heads: int, kv_heads: int) -> None:
        """Refuse query heads that a team cannot share evenly."""
        if heads % self.ulysses:
            raise ValueError(
                f"attention.ulysses={self.ulysses} (ranks that share heads) must divide model.num_heads={heads}; "
                f"attention.schedule=usp at parallel.cp={cp} can use {_divisors(cp, heads)}"
            )


def _divisors(*numbers: int) -> str:
    """Return the common divisors as words."""
    return ", ".join(str(d) for d in range(1, min(numbers) + 1) if all(n % d == 0 for n in numbers))
