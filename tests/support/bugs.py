"""Bugs of context parallelism, to be planted with pytest's monkeypatch: what `longctx verify` must find."""

from dataclasses import replace

import torch
from torch.distributed.fsdp import FSDPModule

import longctx.verification.check_data as check_data
import longctx.verification.check_model as check_model
from longctx.attention_config import AttentionConfig
from longctx.attention_function import Attention
from longctx.kernels.softmax.torch_kernel import TorchKernel
from longctx.loss import IGNORED
from longctx.parallel import balance as balance_module
from longctx.parallel import plan as plan_module
from longctx.parallel.layout import Layout
from longctx.parallel.schedules.ring import Ring
from longctx.parallel.transport import ProcessGroupTransport


def forget_windows(patch):
    """Let the kernel compute everything before the last visible key."""
    whole = TorchKernel._rectangles
    widened = lambda tile: replace(tile, lo=1 - tile.q_count)  # noqa: E731
    patch.setattr(TorchKernel, "_rectangles", lambda self, tiles: whole(self, [widened(tile) for tile in tiles]))


def swap_positions(patch):
    right = Layout.positions

    def swapped(self, rank, total):
        positions = right(self, rank, total)
        positions[[2, 5]] = positions[[5, 2]]
        return positions

    patch.setattr(Layout, "positions", swapped)


def lose_a_hop_of_dk(patch):
    right = Ring.backward

    def backward(self, ring, needs, k, v, *, attend):
        def one_lost(source, heads, k_part, v_part):
            dk, dv = attend(source, heads, k_part, v_part)
            return (torch.zeros_like(dk) if (ring.rank, source) == (2, 1) else dk), dv

        return right(self, ring, needs, k, v, attend=one_lost)

    patch.setattr(Ring, "backward", backward)


def lose_sink_gradients(patch):
    right = Attention.backward

    def backward(ctx, *grads):
        dq, dk, dv, dsink, _ = right(ctx, *grads)
        return dq, dk, dv, torch.zeros_like(dsink), None

    patch.setattr(Attention, "backward", staticmethod(backward))


def shift_labels_after_sharding(patch):
    right = check_data.shard_samples

    def shard(samples, **options):
        batch = right(samples, **options)
        labels = torch.full_like(batch.labels, IGNORED)
        labels[:, :-1] = batch.tokens[:, 1:]
        return replace(batch, labels=labels)

    for module in (check_data, check_model):
        patch.setattr(module, "shard_samples", shard)


def number_positions_by_rank(patch):
    right = check_data.shard_samples

    def shard(samples, **options):
        batch = right(samples, **options)
        positions = {layout: torch.arange(len(each)) for layout, each in batch.plan.positions.items()}
        return replace(batch, plan=replace(batch.plan, positions=positions))

    for module in (check_data, check_model):
        patch.setattr(module, "shard_samples", shard)


def ignore_documents(patch):
    right = AttentionConfig.mask

    def mask(self, bounds, **options):
        return right(replace(self, documents=False), bounds, **options)

    patch.setattr(AttentionConfig, "mask", mask)


def make_an_extra_hop(patch):
    right = Ring.forward

    def forward(self, ring, needs, k, v, *, attend):
        right(self, ring, needs, k, v, attend=attend)
        after, before = (ring.rank + 1) % ring.size, (ring.rank - 1) % ring.size
        ring.exchange({after: [k]}, {before: [torch.empty_like(k)]}).wait()

    patch.setattr(Ring, "forward", forward)


def fetch_everything(patch):
    right = plan_module.needs_of

    def all_of(layout, masks, teams, *, total):
        whole = tuple(tuple((0, total // teams.count) for _ in teams.members) for _ in teams.members)
        return replace(right(layout, masks, teams, total=total), keys=whole)

    patch.setattr(plan_module, "needs_of", all_of)


def lose_a_tile(patch):
    right = plan_module.tiles_between
    patch.setattr(plan_module, "tiles_between", lambda q, k, **options: right(q, k, **options)[1:])


def compute_a_tile_twice(patch):
    right = plan_module.tiles_between

    def twice(q, k, **options):
        tiles = right(q, k, **options)
        return (*tiles[:1], *tiles)

    patch.setattr(plan_module, "tiles_between", twice)


def see_one_key_ahead(patch):
    right = plan_module.tiles_between

    def ahead(q, k, **options):
        return tuple(replace(tile, hi=min(tile.hi + 1, tile.k_count - 1)) for tile in right(q, k, **options))

    patch.setattr(plan_module, "tiles_between", ahead)


def round_angles(patch):
    def table(positions, *, head_dim, theta, dtype=torch.float32):
        rates = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
        angles = positions.float()[:, None] * rates
        return angles.cos().to(dtype), angles.sin().to(dtype)

    patch.setattr(check_data, "rope_table", table)


def skip_the_last_round(patch):
    """Let a layout lose tokens, but only of long sequences."""
    right = balance_module.plan.__wrapped__

    def short(layout, masks, schedule, *, rank, total):
        made = right(layout, masks, schedule, rank=rank, total=total)
        return replace(made, hops=made.hops[:-1]) if total > 1000 else made

    class Planner:
        __wrapped__ = staticmethod(short)

    patch.setattr(balance_module, "plan", Planner)


def round_queries(patch):
    right = TorchKernel.forward

    def forward(self, q, k, v, **options):
        right(self, q.bfloat16().to(q.dtype) if q.dtype == torch.float32 else q, k, v, **options)

    patch.setattr(TorchKernel, "forward", forward)


def add_noise(patch):
    right = TorchKernel.forward

    def forward(self, q, k, v, *, partial, **options):
        right(self, q, k, v, partial=partial, **options)
        if q.dtype == torch.float32:
            partial.out.mul_(1 + 1e-7 * torch.rand(()))

    patch.setattr(TorchKernel, "forward", forward)


def raise_in_the_backward_pass(patch):
    def backward(self, q, k, v, **options):
        raise ZeroDivisionError("planted")

    patch.setattr(TorchKernel, "backward", backward)


def average_over_ranks(patch):
    """Make FSDP2 divide gradients by the number of ranks, as it does by default."""
    patch.setattr(FSDPModule, "set_gradient_divide_factor", lambda self, factor: None)
    patch.setattr(FSDPModule, "set_force_sum_reduction_for_comms", lambda self, enable: None)


def lose_values_on_the_last_rank(patch):
    """Zero what one rank sends, as a broken link would."""
    right = ProcessGroupTransport.exchange

    def exchange(self, outgoing, incoming, *, lane=0):
        if self.rank == self.size - 1 and torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
            outgoing = {peer: [torch.zeros_like(x) for x in tensors] for peer, tensors in outgoing.items()}
        return right(self, outgoing, incoming, lane=lane)

    patch.setattr(ProcessGroupTransport, "exchange", exchange)
