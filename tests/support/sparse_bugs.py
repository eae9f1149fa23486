"""Bugs of sparse layers over ranks, to be planted with pytest's monkeypatch: what `longctx verify` must find."""

from dataclasses import replace

import torch

import longctx.mixers.sparse.moba as moba
import longctx.mixers.sparse.mosa as mosa
import longctx.sparse_attention as sparse_attention
import longctx.verification.sparse_bytes as sparse_bytes
from longctx.kernels.block_sparse.patterns.neighborhood import Neighborhood
from longctx.kernels.block_sparse.routing.mosa import expert_selection
from longctx.kernels.block_sparse.selection import Selection
from longctx.kernels.block_sparse.torch_kernel import TorchSparseKernel
from longctx.parallel.block_layout import block_layout
from longctx.parallel.schedules import block_exchange
from longctx.sparse_function import SelectedAttention
from longctx.sparse_ranks import RankSparse


def drop_a_block(patch):
    """What is agreed on lacks the first block."""
    right = sparse_attention.wanted_blocks

    def wanted(selection, **options):
        found = right(selection, **options).clone()
        found[0] = False
        return found

    patch.setattr(sparse_attention, "wanted_blocks", wanted)


def lose_a_gradient_of_keys(patch):
    """One rank sends no gradients of the keys that it was given."""
    right = block_exchange.backward

    def backward(ring, demand, k, v, *, attend):
        def one_lost(source, heads, k_part, v_part):
            dk, dv = attend(source, heads, k_part, v_part)
            return (torch.zeros_like(dk) if (ring.rank, source) == (1, 0) else dk), dv

        return right(ring, demand, k, v, attend=one_lost)

    patch.setattr(block_exchange, "backward", backward)


def own_blocks_of(place, block_size):
    count = place.total // block_size
    layout = block_layout(place.attention.layout, block_size=block_size, total=place.total)
    return layout.positions(place.attention.transport.rank, count)


def keep_gradients_of_summaries(patch):
    """Every rank has the gradients of its own summaries that its own queries make, and none of others."""
    right = RankSparse.gather_blocks

    def gather(self, x, *, block_size):
        whole = right(self, x.detach(), block_size=block_size)
        return whole.index_copy(1, own_blocks_of(self, block_size), x)

    patch.setattr(RankSparse, "gather_blocks", gather)


def route_by_local_blocks(patch):
    """The summaries of other ranks' blocks are zeros."""
    right = RankSparse.gather_blocks

    def gather(self, x, *, block_size):
        whole = right(self, x, block_size=block_size)
        own = own_blocks_of(self, block_size)
        return torch.zeros_like(whole).index_copy(1, own, whole[:, own])

    patch.setattr(RankSparse, "gather_blocks", gather)


def round_summaries(patch):
    """In float32 alone, and so coarsely that even a few blocks are put in another order."""
    right = RankSparse.gather_blocks

    def gather(self, x, *, block_size):
        return right(self, (4 * x).round() / 4 if x.dtype == torch.float32 else x, block_size=block_size)

    patch.setattr(RankSparse, "gather_blocks", gather)


def send_wide_summaries(patch):
    right = RankSparse.gather_blocks
    patch.setattr(
        RankSparse, "gather_blocks", lambda self, x, *, block_size: right(self, x.double(), block_size=block_size).to(x)
    )


def see_the_future_of_the_own_block(patch):
    """Whole blocks are selected, one rank's equal to that of all."""

    def blocks(chosen, *, block_size, positions, first):
        begin = chosen * block_size
        lo = torch.maximum(begin, first[:, :, None, None])
        hi = begin + block_size - 1
        empty = chosen < 0
        return Selection(lo=torch.where(empty, 1, lo), hi=torch.where(empty, 0, hi), block_size=block_size)

    patch.setattr(moba, "selected_blocks", blocks)


def choose_by_the_whole_document(patch):
    """A chunk's tokens are kept if they are among the best of the document, later ones included."""

    def selection(scores, *, chunk, keep, **options):
        return expert_selection(scores, sparsity=chunk // keep, **options)

    patch.setattr(mosa, "chunk_selection", selection)


def ignore_documents(patch):
    """Ranks take what is packed as one document, where they look for past blocks."""
    first = property(lambda self: torch.zeros_like(self.plan.document_of[:, self.positions]))
    patch.setattr(RankSparse, "first", first)


def lose_gradients_of_gates(patch):
    right = SelectedAttention.backward

    def backward(ctx, dout):
        *grads, dgates, call = right(ctx, dout)
        return *grads, None if dgates is None else torch.zeros_like(dgates), call

    patch.setattr(SelectedAttention, "backward", staticmethod(backward))


def average_losses(patch):
    """What layers add is taken as a mean over the ranks."""
    right = RankSparse.add_loss
    patch.setattr(RankSparse, "add_loss", lambda self, loss: right(self, loss / self.attention.layout.cp))


def lose_losses(patch):
    patch.setattr(RankSparse, "add_loss", lambda self, loss: None)


def widen_a_window(patch):
    """The pattern shows one key more than was asked for, on every rank."""
    right = Neighborhood.selection
    patch.setattr(
        Neighborhood, "selection", lambda self, **options: right(replace(self, window=self.window + 1), **options)
    )


def forget_half_the_costs(patch):
    right = sparse_attention.move_costs

    def costs(*arguments, **options):
        found = right(*arguments, **options)
        return replace(found, hops=found.hops // 2)

    for module in (sparse_attention, sparse_bytes):
        patch.setattr(module, "move_costs", costs)


def round_queries(patch):
    right = TorchSparseKernel.forward

    def forward(self, q, k, v, **options):
        right(self, q.bfloat16().to(q.dtype) if q.dtype == torch.float32 else q, k, v, **options)

    patch.setattr(TorchSparseKernel, "forward", forward)


def add_noise(patch):
    right = TorchSparseKernel.forward

    def forward(self, q, k, v, *, partial, **options):
        right(self, q, k, v, partial=partial, **options)
        if q.dtype == torch.float32:
            partial.out.mul_(1 + 1e-7 * torch.rand(()))

    patch.setattr(TorchSparseKernel, "forward", forward)
