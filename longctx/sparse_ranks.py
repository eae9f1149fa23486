"""A sparse layer's place on one rank of many: block summaries and K/V of the others, by the compositions."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
import torch.distributed as dist
from torch import Tensor

from longctx.attention import ContextParallelAttention, transport_of
from longctx.kernels.block_sparse.blocks import Blocks, blocks_of
from longctx.kernels.block_sparse.op import resolve_kernel
from longctx.kernels.block_sparse.selection import Selection
from longctx.kernels.contract import Request, Scores
from longctx.kernels.mask import Mask, causal, documents, sliding_window
from longctx.linear_attention import ContextParallelLinearAttention, StatePlan
from longctx.parallel.block_layout import block_layout
from longctx.parallel.heads import HeadSplit
from longctx.parallel.layout import Layout
from longctx.parallel.registry import resolve_schedule
from longctx.parallel.routes import Routes, fetch, make_routes
from longctx.parallel.schedule import Schedule
from longctx.parallel.state_passing import resolve_passing
from longctx.parallel.transport import Alone, Transport
from longctx.sparse_attention import Bounds, ContextParallelSparseAttention, Observe, SparsePlan
from longctx.sparse_function import SelectedAttention, SparseCall
from longctx.sparse_moves import SELECTIVE, Here, MovesName

LOCAL_TILE = 128  # summaries of a tile of `attend_local` at most


@dataclass(frozen=True, kw_only=True)
class RankSparse:
    """`mixers.sparse_place.SparsePlace` of one rank; see there.

    Attributes:
        attention: of this kind of layer.
        plan: of the micro-batch.
        positions: int64 `[T]`, of this rank's tokens.
        dense: for windows and distillation, in the same layout.
        linear: for recurrences, in the same layout.
        softcap: of all scores; None = none.
        losses: where `add_loss` puts what it is given; None = nowhere: nothing is trained.
        observe: told what moved.
    """

    attention: ContextParallelSparseAttention
    plan: SparsePlan
    positions: Tensor
    dense: ContextParallelAttention
    linear: ContextParallelLinearAttention
    softcap: float | None = None
    losses: list[Tensor] | None = None
    observe: Observe | None = None
    _blocks: dict[tuple[str, int], Blocks] = field(default_factory=dict, repr=False, compare=False)
    _states: list[StatePlan] = field(default_factory=list, repr=False, compare=False)

    @property
    def total(self) -> int:
        return self.plan.total

    @property
    def document_of(self) -> Tensor:
        return self.plan.document_of

    @property
    def first(self) -> Tensor:
        return self.plan.document_of[:, self.positions]

    @property
    def _transport(self) -> Transport:
        return self.attention.transport

    def own_blocks(self, block_size: int) -> Blocks:
        layout = block_layout(self.attention.layout, block_size=block_size, total=self.total)
        return self._blocks_of("own", layout.positions(self._transport.rank, -(-self.total // block_size)), block_size)

    def all_blocks(self, block_size: int) -> Blocks:
        return self._blocks_of("all", torch.arange(-(-self.total // block_size)), block_size)

    def _blocks_of(self, whose: str, index: Tensor, block_size: int) -> Blocks:
        if (whose, block_size) not in self._blocks:
            index = index.to(self.positions.device)
            made = blocks_of(index, block_size=block_size, total=self.total, document_of=self.document_of)
            self._blocks[whose, block_size] = made
        return self._blocks[whose, block_size]

    def gather_blocks(self, x: Tensor, *, block_size: int) -> Tensor:
        layout = block_layout(self.attention.layout, block_size=block_size, total=self.total)
        return self._gathered(x, layout, -(-self.total // block_size))

    def gather_tokens(self, x: Tensor) -> Tensor:
        return self._gathered(x.detach(), self.attention.layout, self.total)

    def gather_keys(self, k: Tensor) -> Tensor:
        return self._gathered(k.detach(), self.attention.layout, self.total)

    def _gathered(self, x: Tensor, layout: Layout, count: int) -> Tensor:
        if layout.cp == 1:
            return x
        routes = _to_all(layout, self._transport.rank, count, x.device)
        return fetch(x, routes=routes, transport=self._transport)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        selection: Selection,
        gates: Tensor | None = None,
        sink_logits: Tensor | None = None,
    ) -> Tensor:
        return self.attention(
            q,
            k,
            v,
            selection=selection,
            plan=self.plan,
            gates=gates,
            weights="softmax" if gates is None else "gated",
            softcap=self.softcap,
            sink_logits=sink_logits,
            observe=self.observe,
        )

    def attend_sum(self, q: Tensor, k: Tensor, v: Tensor, *, selection: Selection) -> Tensor:
        return self.attention(q, k, v, selection=selection, plan=self.plan, weights="sum", observe=self.observe)

    def attend_window(self, q: Tensor, k: Tensor, v: Tensor, *, window: int) -> Tensor:
        return self._masked(q, k, v, sliding_window(window - 1, None), None)

    def attend_dense(self, q: Tensor, k: Tensor, v: Tensor, *, sink_logits: Tensor | None) -> Tensor:
        return self._masked(q, k, v, causal(), sink_logits)

    def _masked(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, sink_logits: Tensor | None) -> Tensor:
        masks = [causal() & mask & documents(row) for row in self.plan.bounds]
        plan = self.dense.plan(masks, total=self.total)
        return self.dense(q, k, v, plan=plan, softcap=self.softcap, sink_logits=sink_logits)

    def attend_local(self, q: Tensor, k: Tensor, v: Tensor, *, seen: Tensor) -> Tensor:
        begin, end = seen.unbind(-1)
        lo, hi = (each[:, :, None, None].expand(-1, -1, k.shape[2], -1) for each in (begin, end - 1))
        tile = max(min(LOCAL_TILE, k.shape[1]), 1)
        selection = Selection(lo=lo, hi=hi, block_size=tile)
        return attend_here(q, k, v, selection=selection, kernel=self.attention.kernel, softcap=self.softcap)

    def recur(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not self._states:
            self._states.append(self.linear.plan(self.plan.bounds, total=self.total, device=q.device))
        return self.linear(q, k, v, plan=self._states[0], scale=1.0)

    @property
    def trains(self) -> bool:
        return self.losses is not None

    def add_loss(self, loss: Tensor) -> None:
        if self.losses is not None:
            self.losses.append(loss)


def sparse_place(
    *,
    total: int,
    device: torch.device,
    layout: Layout | str = "zigzag",
    schedule: Schedule | str = "ring",
    bounds: Sequence[Bounds] | None = None,
    group: dist.ProcessGroup | Transport | None = None,
    kernel: str = "auto",
    moves: MovesName = "auto",
    heads: int | None = None,
    softcap: float | None = None,
    losses: list[Tensor] | None = None,
    observe: Observe | None = None,
) -> RankSparse:
    """Return what sparse mixers need on one rank, for any model; see `examples/sparse.py`.

    All ranks of the group make it together, with the same arguments, for each micro-batch.

    Args:
        total: tokens of a sequence.
        device: of this rank's tokens.
        layout: a `Layout`, or its name: `contiguous`, `zigzag`, `striped`.
        schedule: a schedule, or its name with default options: see `parallel.registry.resolve_schedule`.
        bounds: `cu_seqlens` of the packed documents, one for all rows or one per row; None = nothing is packed.
        group: the context-parallel process group; None = this process alone has whole sequences.
        kernel: see `kernels.block_sparse.op.resolve_kernel`.
        moves: see `sparse_moves`.
        heads: query heads, for schedules that split them.
        softcap: of all scores.
        losses: filled with what mixers want minimised besides, sums over this rank's tokens; None = nothing is trained.
        observe: told what moved.

    Raises:
        ValueError: a name that is not known, a length or documents that do not fit, or `moves` without effect.
    """
    transport = transport_of(group)
    if isinstance(layout, str):
        layout = Layout(layout, transport.size)  # type: ignore[arg-type]
    if isinstance(schedule, str):
        schedule = resolve_schedule(schedule, cp=transport.size, heads=heads)
    attention = ContextParallelSparseAttention(
        layout=layout, schedule=schedule, transport=transport, kernel=kernel, moves=moves
    )
    if moves in SELECTIVE and schedule.teams(transport.size).count == 1 < transport.size:
        raise ValueError(
            f"moves={moves} has no effect with schedule={schedule.name} on {transport.size} ranks, which all share "
            "heads, so that nothing that is selected travels: leave it auto"
        )
    return RankSparse(
        attention=attention,
        plan=attention.plan(bounds, total=total, device=device),
        positions=layout.positions(transport.rank, total).to(device),
        dense=ContextParallelAttention(layout=layout, schedule=schedule, transport=transport),
        linear=ContextParallelLinearAttention(
            layout=layout, passing=resolve_passing("all_gather"), transport=transport
        ),
        softcap=softcap,
        losses=losses,
        observe=observe,
    )


def attend_here(
    q: Tensor, k: Tensor, v: Tensor, *, selection: Selection, kernel: str = "auto", softcap: float | None = None
) -> Tensor:
    """Attend to selected ones of keys that are all at hand, at the positions 0, 1, ...

    Args:
        q: `[B, T, H, D]`; k, v: `[B, Tk, HK, D]`, as many as there are, whatever T is.
    """
    heads, kv_heads = q.shape[2], k.shape[2]
    request = Request(
        device_type=q.device.type,
        dtype=q.dtype,
        head_dim=q.shape[-1],
        v_head_dim=v.shape[-1],
        num_heads=heads,
        num_kv_heads=kv_heads,
        softcap=softcap is not None,
    )
    call = SparseCall(
        layout=Layout("contiguous", 1),
        schedule=resolve_schedule("local"),
        transport=Alone(),
        split=HeadSplit(heads, kv_heads, 1),
        total=k.shape[1],
        kernel=resolve_kernel(kernel, request, "softmax"),
        weights="softmax",
        scores=Scores(softmax_scale=q.shape[-1] ** -0.5, softcap=softcap),
        selection=selection,
        moves=Here(),
        places=(torch.arange(k.shape[1], device=k.device),),
    )
    return SelectedAttention.apply(q, k, v, None, None, call)


@lru_cache(maxsize=16)  # on the device: at most 24 bytes per position
def _to_all(layout: Layout, rank: int, count: int, device: torch.device) -> Routes:
    """Return the routes by which every rank gets everything, in the order of positions."""
    wanted: Sequence[Tensor] = [torch.arange(count)] * layout.cp
    return make_routes(layout, wanted, rank=rank, total=count, device=device)
