"""A stack of softmax, sparse and linear layers over ranks: the layout of each layer, who mixes in it, and the plans.

Softmax layers want balance, linear layers the order of the sequence. Where these are different layouts, tokens are
relaid between them: a run of neighbouring linear layers pays one relayout in and one out. The stack begins in the
layout of its first layer and ends in that of its last: tokens and labels are cut for them, and nothing is moved there.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import pairwise

import torch
from torch import Tensor

from longctx.attention import ContextParallelAttention
from longctx.attention_config import AttentionConfig
from longctx.kernels.mask import HeadMasks, Mask
from longctx.linear_attention import ContextParallelLinearAttention, StatePlan
from longctx.metrics.sparse import SparseMonitor
from longctx.mixers.layers import Layers
from longctx.mixers.pattern import describe_layers
from longctx.mixers.place import Place
from longctx.mixers.shape import linear_shape
from longctx.mixers.sparse.base import SparseMixerConfig
from longctx.model import ModelConfig
from longctx.parallel.balance import visible_pairs
from longctx.parallel.cost import in_bytes
from longctx.parallel.layout import Layout
from longctx.parallel.plan import Plan
from longctx.parallel.relayout import relayout
from longctx.parallel.state_passing import resolve_passing
from longctx.parallel.states.stream import Pipelined
from longctx.parallel.transport import Transport
from longctx.sparse_attention import ContextParallelSparseAttention, SparsePlan
from longctx.sparse_ranks import RankSparse
from longctx.stack_traffic import StackShape, choose_state_layout

Bounds = Sequence[int]


@dataclass(frozen=True, kw_only=True)
class StackPlan:
    """What one rank needs to know of a micro-batch.

    Attributes:
        total: tokens of a sequence.
        positions: int64 `[T]`, those of this rank in each layout that occurs.
        softmax: the plan of each kind of softmax layer that there is.
        states: the plan of the linear layers, None without any.
        sparse: the plan of the sparse layers, None without any.
        step: optimizer steps before this one.
        losses: what layers want minimised besides the losses of tokens: sums over this rank's tokens.
    """

    total: int
    positions: dict[Layout, Tensor]
    softmax: dict[str, Plan]
    states: StatePlan | None
    sparse: SparsePlan | None
    step: int
    losses: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Stack:
    """All layers of a model on one rank; one object per run, made by `build_stack`.

    Attributes:
        config: names for everything, no `auto`.
        softmax: for softmax layers, whatever their mask.
        linear: for each linear kind.
        sparse: for each sparse kind.
        sums: linear attention in the layout of softmax layers, for sparse kinds that have some inside.
        monitor: told what sparse layers select and move.
        states: the layout of all linear layers.
    """

    config: AttentionConfig
    layers: Layers
    model: ModelConfig
    softmax: ContextParallelAttention
    linear: dict[str, ContextParallelLinearAttention]
    sparse: dict[str, ContextParallelSparseAttention]
    sums: ContextParallelLinearAttention
    monitor: SparseMonitor
    states: Layout
    shape: StackShape

    @cached_property
    def layouts(self) -> tuple[Layout, ...]:
        """Return the layout of each layer."""
        return self.shape.layouts(self.states)

    @property
    def transport(self) -> Transport:
        """Return this rank's view of the context-parallel group."""
        return self.softmax.transport

    @property
    def first(self) -> Layout:
        """Return the layout of the tokens that go in."""
        return self.layouts[0]

    @property
    def last(self) -> Layout:
        """Return the layout of the logits that come out, and of their labels."""
        return self.layouts[-1]

    def masks(self, cu_seqlens: Bounds) -> dict[str, Mask | HeadMasks]:
        """Return the mask of one packed sequence for each kind of softmax layer that there is."""
        return {kind: self.config.mask(cu_seqlens, kind=kind) for kind in self.layers.softmax_kinds}

    def visible_pairs(self, cu_seqlens: Bounds, *, total: int) -> int:
        """Return the (query, key) pairs of one packed sequence, summed over the softmax and sparse layers."""
        dense = sum(
            self.layers.kinds.count(kind) * visible_pairs(mask, total=total)
            for kind, mask in self.masks(cu_seqlens).items()
        )
        bounds = cu_seqlens if self.config.documents else (0, total)
        return dense + sum(
            self.layers.kinds.count(kind) * settings.pairs(begin, end - begin)
            for kind, settings in self._sparse_settings.items()
            for begin, end in pairwise(bounds)
        )

    @cached_property
    def _sparse_settings(self) -> dict[str, SparseMixerConfig]:
        heads, kv_heads = self.model.num_heads, self.model.num_kv_heads
        settings = {kind: self.layers.mixers.sparse_kind(kind) for kind in self.layers.sparse_kinds}
        return {kind: each.of_model(heads=heads, kv_heads=kv_heads) for kind, each in settings.items()}

    def plan(self, bounds: Sequence[Bounds], *, total: int, device: torch.device, step: int = 0) -> StackPlan:
        """Return this rank's plan for a micro-batch.

        Args:
            bounds: `cu_seqlens` of each row.
            total: tokens of a sequence.
            step: optimizer steps before this one.
        """
        rows = [self.masks(each) for each in bounds]
        softmax = {kind: self.softmax.plan([row[kind] for row in rows], total=total) for kind in rows[0]}
        packed = bounds if self.config.documents else None
        linear, sparse = next(iter(self.linear.values()), None), next(iter(self.sparse.values()), None)
        rank = self.transport.rank
        return StackPlan(
            total=total,
            positions={layout: layout.positions(rank, total).to(device) for layout in dict.fromkeys(self.layouts)},
            softmax=softmax,
            states=None if linear is None else linear.plan(packed, total=total, device=device),
            sparse=None if sparse is None else sparse.plan(packed, total=total, device=device),
            step=step,
        )

    def places(self, plan: StackPlan) -> list[Place]:
        """Return where each layer is, and who mixes there, for the decoder."""
        kinds = {kind: self._sparse(kind, plan) for kind in self.layers.sparse_kinds}
        return [self._place(index, plan, kinds) for index in range(len(self.layouts))]

    def _sparse(self, kind: str, plan: StackPlan) -> RankSparse:
        assert plan.sparse is not None
        return RankSparse(
            attention=self.sparse[kind],
            plan=plan.sparse,
            positions=plan.positions[self.softmax.layout],
            dense=self.softmax,
            linear=self.sums,
            softcap=self.model.softcap,
            losses=plan.losses,
            observe=partial(self.monitor.add, kind) if torch.is_grad_enabled() else None,
        )

    def _place(self, index: int, plan: StackPlan, sparse: dict[str, RankSparse]) -> Place:
        kind, layout = self.layers.kinds[index], self.layouts[index]
        before = self.layouts[index - 1] if index else layout
        enter = None
        if layout != before:
            enter = partial(relayout, source=before, target=layout, total=plan.total, transport=self.transport)
        positions = plan.positions[layout]
        if kind in plan.softmax:
            attend = partial(self.softmax, plan=plan.softmax[kind], softcap=self.model.softcap)
            return Place(positions=positions, enter=enter, attend=attend, step=plan.step)
        if kind in sparse:
            return Place(positions=positions, enter=enter, sparse=sparse[kind], step=plan.step)
        assert plan.states is not None
        linear, chunk_size = self.linear[kind], self.layers.mixers.linear_kind(kind).chunk_size
        return Place(
            positions=positions,
            enter=enter,
            recur=partial(linear, plan=plan.states, chunk_size=chunk_size),
            convolve=partial(linear.convolve, plan=plan.states),
            step=plan.step,
        )


def stack_shape(
    config: AttentionConfig, *, layers: Layers, model: ModelConfig, cp: int, total: int, dtype: torch.dtype
) -> StackShape:
    """Return what the traffic of a stack depends on.

    Raises:
        ValueError: states that are to be cut into more blocks than they have columns.
    """
    shapes = [
        linear_shape(layers, each, heads=model.num_heads, head_dim=model.head_size) for each in layers.linear_kinds
    ]
    columns = [values for shape in shapes for _, values in shape.recurrences]
    splits = config.state_splits
    if splits is not None and columns and splits > min(columns):
        raise ValueError(
            f"attention.state_splits={splits} cuts states into more blocks than they have columns: at most "
            f"{min(columns)} (the smallest head_dim of values); lower it"
        )
    if splits is None and config.state_passing == "pipelined":
        splits = min([Pipelined.splits, *columns])
    return StackShape(
        layers=layers,
        softmax_layout=config.make_layout(cp),
        passing=resolve_passing(config.state_passing, splits=splits),
        total=total,
        dim=model.dim,
        heads=model.num_heads,
        head_dim=model.head_size,
        dtype=dtype,
    )


def build_stack(
    config: AttentionConfig,
    *,
    layers: Layers,
    model: ModelConfig,
    total: int,
    dtype: torch.dtype,
    transport: Transport,
    per_machine: int,
) -> Stack:
    """Return the stack of one rank.

    Args:
        config: without `auto`.
        total: tokens of a sequence, which the automatic layout of linear layers depends on.
        dtype: of the arithmetic, likewise.
        transport: of the context-parallel group.
        per_machine: its neighbouring ranks that are on one machine.
    """
    cp = transport.size
    shape = stack_shape(config, layers=layers, model=model, cp=cp, total=total, dtype=dtype)
    states = choose_state_layout(shape, config.state_layout)
    schedule = config.make_schedule(cp, heads=model.num_heads, kv_heads=model.num_kv_heads, per_machine=per_machine)
    return Stack(
        config=config,
        layers=layers,
        model=model,
        softmax=ContextParallelAttention(
            layout=config.make_layout(cp), schedule=schedule, transport=transport, kernel=config.kernel
        ),
        linear={
            kind: ContextParallelLinearAttention(
                layout=states,
                passing=shape.passing,
                transport=transport,
                kernel=layers.mixers.linear_kind(kind).kernel,
            )
            for kind in layers.linear_kinds
        },
        sparse={
            kind: ContextParallelSparseAttention(
                layout=config.make_layout(cp),
                schedule=schedule,
                transport=transport,
                kernel=layers.mixers.sparse_kind(kind).kernel,
                moves=config.moves,
            )
            for kind in layers.sparse_kinds
        },
        sums=ContextParallelLinearAttention(layout=config.make_layout(cp), passing=shape.passing, transport=transport),
        monitor=SparseMonitor(),
        states=states,
        shape=shape,
    )


def describe_linear(shape: StackShape, *, states: Layout, sequences: int = 1) -> list[str]:
    """Say in lines how linear layers run and what they send, forward and backward; nothing without any.

    Args:
        states: their layout.
        sequences: that a rank takes part in.
    """
    if not shape.layers.linear:
        return []
    line = f"linear layers: {len(shape.layers.linear)} of {describe_layers(shape.layers.kinds)}"
    if states.cp == 1:
        return [line]
    sent, relayouts = shape.most(states), shape.relayouts(states).total()
    told = f"{in_bytes(sent.states * sequences)} of states"
    if sent.halos:
        told += f" and {in_bytes(sent.halos * sequences)} of halos"
    of = f"{sequences} sequence(s), forward and backward"
    lines = [f"{line}, {states.describe()}, {shape.passing.name}: a rank sends at most {told} for {of}"]
    if relayouts:
        change = f"{shape.softmax_layout.describe()} <-> {states.describe()}"
        lines.append(
            f"relayout: {relayouts} of the hidden states per forward, {change}: a rank sends at most "
            f"{in_bytes(sent.moved * sequences)} for {of}"
        )
    return lines
