"""Bugs of linear attention over ranks, to be planted with pytest's monkeypatch: what `longctx verify` must find."""

from dataclasses import replace

import torch

import longctx.linear_attention as linear_attention
import longctx.parallel.relayout as relayout_module
from longctx.kernels.linear.affine import Affine
from longctx.kernels.linear.contract import Cuts
from longctx.kernels.linear.torch_kernel import TorchKernel
from longctx.linear_attention import StatePlan
from longctx.parallel.halo import extend
from longctx.parallel.routes import Routes
from longctx.parallel.states.all_gather import AllGather


def let_a_wrong_state_enter(patch):
    """One rank begins with nothing."""
    right = linear_attention.pass_states

    def passed(summary, *, transport, **options):
        states = right(summary, transport=transport, **options)
        return states * (transport.rank != 1)

    patch.setattr(linear_attention, "pass_states", passed)


def go_on_across_documents(patch):
    """One rank's kernel does not know where documents begin."""
    right = linear_attention.cuts

    def cuts(layout, *, rank, **options):
        made = right(layout, rank=rank, **options)
        return Cuts(lengths=made.lengths) if rank == 0 else made

    patch.setattr(linear_attention, "cuts", cuts)


def convolve_across_documents(patch):
    patch.setattr(StatePlan, "extended_documents", lambda self, reach: None)


def send_no_gradients_of_states(patch):
    """Every rank's gradients are those of its own outputs, which is right on the last one only."""
    right = linear_attention.pass_states

    def passed(summary, **options):
        return right(Affine(summary.transition.detach(), summary.state.detach()), **options)

    patch.setattr(linear_attention, "pass_states", passed)


def lose_gradients_of_transitions(patch):
    right = linear_attention.pass_states

    def passed(summary, **options):
        return right(Affine(summary.transition.detach(), summary.state), **options)

    patch.setattr(linear_attention, "pass_states", passed)


def lose_a_halo(patch):
    """What stands before a run is zeros on one rank."""

    def extended(x, *, layout, transport, reach, **options):
        right = extend(x, layout=layout, transport=transport, reach=reach, **options)
        if transport.rank == 2 and reach:
            right = torch.cat([torch.zeros_like(right[:, :reach]), right[:, reach:]], dim=1)
        return right

    patch.setattr(linear_attention, "extend", extended)


def keep_states_in_bfloat16(patch):
    right = TorchKernel.begin

    class Rounded:
        def __init__(self, work):
            self.work = work

        def summary(self):
            made = self.work.summary()
            if made.state.dtype == torch.float64:
                return made
            return Affine(made.transition, made.state.bfloat16().float())

        def finish(self, states):
            return self.work.finish(states)

    patch.setattr(TorchKernel, "begin", lambda self, *args, **options: Rounded(right(self, *args, **options)))


def exchange_two_tokens(patch):
    """A relayout brings two tokens of a rank in the wrong order."""
    right = relayout_module.make_routes

    def make(layout, wanted, **options):
        swapped = [positions.clone() for positions in wanted]
        swapped[0][[0, 1]] = swapped[0][[1, 0]]
        return right(layout, swapped, **options)

    patch.setattr(relayout_module, "make_routes", make)


def send_a_halo_twice(patch):
    right = Routes.sent
    patch.setattr(Routes, "sent", lambda self, row_bytes: replace(right(self, 2 * row_bytes)))


def send_states_to_all(patch):
    """Every rank sends its maps to the ranks before it too, and plans to."""
    right = AllGather.incoming

    def incoming(self, summary, *, chain, transport):
        before, after = range(transport.rank), range(transport.rank + 1, transport.size)
        if transport.size > 1:
            ours = summary.state.detach().contiguous()
            theirs = {peer: [torch.empty_like(ours)] for peer in after}
            transport.exchange({peer: [ours] for peer in before}, theirs).wait()
        return right(self, summary, chain=chain, transport=transport)

    patch.setattr(AllGather, "incoming", incoming)
