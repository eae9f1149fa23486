"""The composition for sparse attention: token layout x K/V that move x selection x local kernel.

What `attention.py` is for masks, with a selection in the mask's place: it is made of data, on every rank for its own
queries, so which K/V are needed is agreed on when it is there (`parallel/demand.py`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from longctx.arrangement import Arrangement
from longctx.attention import check_qkv
from longctx.kernels.block_sparse.contract import Weights
from longctx.kernels.block_sparse.op import KERNELS, resolve_kernel
from longctx.kernels.block_sparse.selection import Selection, narrowed
from longctx.kernels.contract import Request, Scores
from longctx.kernels.positions import check_bounds
from longctx.parallel.demand import Demand, Shards, agree, shards_of
from longctx.parallel.heads import HeadSplit
from longctx.parallel.layout import Layout
from longctx.parallel.schedule import Schedule, Shape
from longctx.parallel.teams import Teams
from longctx.parallel.transport import Transport
from longctx.sparse_function import SelectedAttention, SparseCall, on_team
from longctx.sparse_moves import MOVES, MoveCosts, Moves, MovesName, distances, make_moves, move_costs, wanted_blocks

BUCKETS = 24  # of distances: 0, 1, 2-3, 4-7, ... blocks
Bounds = Sequence[int]


@dataclass(frozen=True, kw_only=True)
class Movement:
    """What one layer moved, of all ranks that have this one's heads.

    Attributes:
        moves: the way that was taken.
        density: tokens of others that are needed, over those that the causal mask shows; 0 where nothing moves.
        costs: bytes of each way, forward and backward, of all rows.
        distances: selected slots by their distance in blocks: 0, 1, 2-3, 4-7, ...
    """

    moves: MovesName
    density: float
    costs: MoveCosts
    distances: tuple[int, ...]

    @property
    def sent(self) -> tuple[int, int]:
        """Return the bytes that were sent, and those that dense attention would have sent."""
        return self.costs.of(self.moves), self.costs.all


Observe = Callable[[Movement], None]


@dataclass(frozen=True, kw_only=True)
class SparsePlan:
    """What all layers know of a micro-batch before anything is selected.

    Attributes:
        bounds: `cu_seqlens` of each row, or one for all rows.
        document_of: int64 `[R, total]`, the first position of each position's document, on the device of the tokens.
    """

    layout: Layout
    rank: int
    total: int
    bounds: tuple[tuple[int, ...], ...]
    document_of: Tensor
    _shown: dict[tuple[Teams, int], Demand] = field(default_factory=dict, repr=False, compare=False)
    # What all teams need of a selection, and its distances: layers that share one agree once for the same schedule.
    agreed: "WeakKeyDictionary[Selection, dict[tuple[Teams, HeadSplit], tuple[Demand, tuple[int, ...]]]]" = field(
        default_factory=WeakKeyDictionary, repr=False, compare=False
    )

    @property
    def tokens(self) -> int:
        """Return this rank's tokens."""
        return self.total // self.layout.cp

    def shown(self, teams: Teams, block_size: int) -> Demand:
        """Return the blocks that the causal mask and the documents show to each team."""
        if (teams, block_size) not in self._shown:
            shards = shards_of(self.layout, teams, total=self.total, block_size=block_size)
            document_of = self.document_of.cpu()
            wanted = torch.stack([_shown(places, document_of, shards, self.total) for places in shards.positions])
            self._shown[teams, block_size] = Demand(shards, wanted)
        return self._shown[teams, block_size]


@dataclass(frozen=True, kw_only=True)
class ContextParallelSparseAttention:
    """Attention to selected keys over a context-parallel group: one object per (layout, schedule, group, kernel).

    Attributes:
        kernel: `auto`, `torch`, `triton` or `reference`: see `kernels.block_sparse.op.resolve_kernel`.
        moves: `auto`, `all`, `hops` or `blocks`: see `sparse_moves`.
    """

    layout: Layout
    schedule: Schedule
    transport: Transport
    kernel: str = "auto"
    moves: MovesName = "auto"

    def __post_init__(self) -> None:
        if self.layout.cp != self.transport.size:
            raise ValueError(
                f"the layout is for cp={self.layout.cp}, the transport's group has {self.transport.size} rank(s)"
            )
        if self.moves not in MOVES:
            raise ValueError(f"moves={self.moves} is not known; known are {', '.join(MOVES)} (attention.kv_moves)")
        if self.kernel not in KERNELS:
            raise ValueError(f"kernel={self.kernel} is not known; known are {', '.join(KERNELS)}")
        self.schedule.teams(self.transport.size)

    def plan(self, bounds: Sequence[Bounds] | None, *, total: int, device: torch.device) -> SparsePlan:
        """Return this rank's plan for a micro-batch of sequences of `total` tokens.

        Args:
            bounds: `cu_seqlens` (0 ... total) of the packed documents, one for all rows of the batch or one per row;
                None = every sequence is one document.
            device: of the tokens.
        """
        self.layout.check_total(total)
        if bounds is not None and (not bounds or not all(hasattr(row, "__len__") for row in bounds)):
            raise ValueError(f"bounds must be a list with cu_seqlens for each row, or for all rows; given {bounds}")
        rows = ((0, total),) if bounds is None else tuple(tuple(map(int, row)) for row in bounds)
        for row in rows:
            check_bounds(row, total=total)
        if len(set(rows)) == 1:
            rows = rows[:1]
        return SparsePlan(
            layout=self.layout,
            rank=self.transport.rank,
            total=total,
            bounds=rows,
            document_of=torch.stack([_document_of(row) for row in rows]).to(device),
        )

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        selection: Selection,
        plan: SparsePlan,
        gates: Tensor | None = None,
        weights: Weights = "softmax",
        softmax_scale: float | None = None,
        softcap: float | None = None,
        sink_logits: Tensor | None = None,
        observe: Observe | None = None,
    ) -> Tensor:
        """Attend this rank's queries to the keys of all ranks that they selected.

        All ranks of the group call it together, forward and backward.

        Args:
            q: `[B, T, H, D]` with T this rank's tokens in the layout's order.
            k, v: `[B, T, HK, D]` and `[B, T, HK, Dv]`; HK divides H.
            selection: of this rank's queries, for H or HK heads, for B rows or one. Ranks agree on what is needed once
                for each object: those that give the same one again do so together.
            plan: from `plan`.
            gates: `[B, T, H, S]` with weights `gated`, where slots are blocks that the layout keeps whole.
            weights: `softmax`, `gated` or `sum`: see `kernels.block_sparse.contract`.
            softmax_scale: default `D ** -0.5`; weights `sum` have none.
            softcap: scores s become `softcap * tanh(s / softcap)`.
            sink_logits: `[H]`; its gradient is this rank's share, like any parameter's: sum it over the ranks.
            observe: told what moved; distances are of the ranks that observe.

        Returns:
            out `[B, T, H, Dv]` in q's dtype.

        Raises:
            ValueError: shapes or dtypes that do not fit each other or the plan, heads that the schedule cannot split,
                or a kernel that cannot serve.
        """
        self._check(q, k, v, selection, plan)
        assert gates is None or selection.beside is None, "gates are of the slots of one selection"
        teams = self.schedule.teams(self.layout.cp)
        split = HeadSplit(q.shape[2], k.shape[2], teams.size)
        arrangement = Arrangement(
            layout=self.layout, schedule=self.schedule, transport=self.transport, split=split, total=plan.total
        )
        request = Request(
            device_type=q.device.type,
            dtype=q.dtype,
            head_dim=q.shape[-1],
            v_head_dim=v.shape[-1],
            num_heads=len(split.q(0)),
            num_kv_heads=len(split.kv(0)),
            softcap=softcap is not None,
        )
        scale = 1.0 if weights == "sum" else q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
        mine = narrowed(on_team(arrangement, selection, device=q.device), total=plan.total)
        shape = Shape(
            heads=request.num_heads,
            kv_heads=request.num_kv_heads,
            head_dim=q.shape[-1],
            v_head_dim=v.shape[-1],
            dtype=q.dtype,
        )
        call = SparseCall(
            layout=self.layout,
            schedule=self.schedule,
            transport=self.transport,
            split=split,
            total=plan.total,
            kernel=resolve_kernel(self.kernel, request, weights),
            weights=weights,
            scores=Scores(softmax_scale=scale, softcap=softcap),
            selection=mine,
            moves=self._moves(arrangement, selection, mine, plan, shape, batch=q.shape[0], observe=observe),
            places=_places(self.layout, teams, plan.total, q.device),
        )
        return SelectedAttention.apply(q, k, v, sink_logits, gates, call)

    def _moves(
        self,
        arrangement: Arrangement,
        selection: Selection,
        own: Selection,
        plan: SparsePlan,
        shape: Shape,
        *,
        batch: int,
        observe: Observe | None,
    ) -> Moves:
        """Agree with the other teams on what each needs, once for a selection, and choose the way.

        `own` is the selection of this rank's heads and its team's tokens.
        """
        teams, block_size = arrangement.teams, selection.block_size
        team, ring = teams.place(self.transport.rank)[0], arrangement.ring
        shown = plan.shown(teams, block_size)
        if observe is None and ring.size == 1:
            return make_moves("all", self.schedule, static=shown.needs, demand=shown, team=team)
        agreed, key = plan.agreed.setdefault(selection, {}), (teams, arrangement.split)
        if key not in agreed:
            # Told in any case, so that a rank may observe what others do not.
            told: Sequence[int] = (0,) * BUCKETS
            if observe is not None:
                positions = _places(self.layout, teams, plan.total, own.lo.device)[team]
                told = distances(own, positions, block_size=block_size, buckets=BUCKETS)
            wanted, numbers = agree(ring, wanted_blocks(own, block_size=block_size, total=plan.total), told)
            agreed[key] = Demand(shown.shards, wanted), tuple(numbers.sum(0).tolist())
        demand, counts = agreed[key]
        name = "all" if ring.size == 1 else self.moves
        if observe is not None or name == "auto":
            costs = move_costs(self.schedule, static=shown.needs, demand=demand, shape=shape)
            name = costs.choose(name)
        if observe is not None:
            observe(
                Movement(
                    moves=name,
                    density=demand.moved / max(shown.moved, 1),
                    costs=MoveCosts(all=costs.all * batch, hops=costs.hops * batch, blocks=costs.blocks * batch),
                    distances=counts,
                )
            )
        return make_moves(name, self.schedule, static=shown.needs, demand=demand, team=team)

    def _check(self, q: Tensor, k: Tensor, v: Tensor, selection: Selection, plan: SparsePlan) -> None:
        check_qkv(q, k, v, tokens=plan.tokens)
        if len(plan.bounds) not in (1, q.shape[0]):
            raise ValueError(f"need documents for all rows or for each; given {len(plan.bounds)} for {q.shape[0]} rows")
        if (plan.layout, plan.rank) != (self.layout, self.transport.rank):
            raise ValueError(f"the plan is rank {plan.rank}'s for {plan.layout}; this is rank {self.transport.rank}'s")
        heads, kv_heads = q.shape[2], k.shape[2]
        self.schedule.check(self.layout.cp, heads=heads, kv_heads=kv_heads)
        for part in selection.parts():
            if part.heads not in (heads, kv_heads) or part.rows not in (1, q.shape[0]):
                raise ValueError(
                    f"a selection must be for all {heads} heads or all {kv_heads} KV heads, and for all {q.shape[0]} "
                    f"rows or one; given {part.heads} heads and {part.rows} rows"
                )
        if selection.tokens != q.shape[1]:
            raise ValueError(f"the selection is of {selection.tokens} queries; q has {q.shape[1]}")


def _document_of(bounds: Bounds) -> Tensor:
    starts, ends = torch.tensor(bounds[:-1]), torch.tensor(bounds[1:])
    return torch.repeat_interleave(starts, ends - starts)


def _shown(places: Tensor, document_of: Tensor, shards: Shards, total: int) -> Tensor:
    everything = Selection(
        lo=document_of[:, places, None, None],
        hi=places[None, :, None, None].expand(len(document_of), -1, -1, -1),
        block_size=shards.block_size,
    )
    return wanted_blocks(everything, block_size=shards.block_size, total=total)


@lru_cache(maxsize=8)  # on the device: 8 bytes per position of the whole sequence
def _places(layout: Layout, teams: Teams, total: int, device: torch.device) -> tuple[Tensor, ...]:
    return tuple(places.to(device) for places in shards_of(layout, teams, total=total, block_size=1).positions)
