"""State passing: the state that enters each segment, which another rank's tokens made.

Every segment maps states, `S -> M S + R` (`kernels/linear/affine.py`), and segments follow each other in a chain over
all ranks. What enters a segment is the exclusive prefix of the chain. Backward is the same problem on the reversed
chain: with d the gradient of what enters a segment, as far as its own outputs go, and E that of what leaves it,

    E of a segment = d + M^T E of the next one,    dR = E,    dM = E S^T

so each method below serves both passes, and moves as many bytes in both, whatever the sequence's length.
"""

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longctx.kernels.linear.affine import Affine, transposed
from longctx.kernels.precision import without_autocast
from longctx.parallel.chain import Chain
from longctx.parallel.schedule import Sent
from longctx.parallel.states.all_gather import AllGather
from longctx.parallel.states.log_depth import LogDepth
from longctx.parallel.states.stream import Pipelined, Ring
from longctx.parallel.transport import Transport

PASSINGS = ("ring", "all_gather", "log_depth", "pipelined")


class StatePassing(Protocol):
    """A way to bring states from segment to segment. A value: equal fields, equal behaviour."""

    @property
    def name(self) -> str: ...

    def incoming(self, summary: Affine, *, chain: Chain, transport: Transport) -> Tensor:
        """Return the state that enters each of this rank's segments; all ranks of the chain call it together.

        Args:
            summary: of this rank's segments by local index: transition `[B, P, H, ...]`, state `[B, P, H, K, V]`.

        Returns:
            `[B, P, H, K, V]`, zeros for the first segment of the chain.
        """
        ...

    def sent(self, chain: Chain, rank: int, *, transition_bytes: int, state_bytes: int) -> Sent:
        """Return what a rank sends in the forward pass, or, given the reversed chain, in the backward pass.

        Args:
            transition_bytes, state_bytes: of one segment, with all rows of the batch and all heads.
        """
        ...


def resolve_passing(name: str, *, splits: int | None = None) -> StatePassing:
    """Return the method called `name`.

    Args:
        splits: blocks of columns that `pipelined` cuts a state into; None = 4.

    Raises:
        ValueError: an unknown name, or an option that it does not have.
    """
    if name not in PASSINGS:
        raise ValueError(f"attention.state_passing={name} is not known; known are {', '.join(PASSINGS)}")
    if splits is not None and name != "pipelined":
        raise ValueError(
            f"attention.state_splits={splits} is an option of attention.state_passing=pipelined; given "
            f"attention.state_passing={name}. Leave it null"
        )
    if splits is not None and splits < 1:
        raise ValueError(f"attention.state_splits must be >= 1 or null; given {splits}")
    if name == "pipelined":
        return Pipelined(splits=splits or Pipelined.splits)
    if name == "all_gather":
        return AllGather()
    return LogDepth() if name == "log_depth" else Ring()


def pass_states(summary: Affine, *, passing: StatePassing, chain: Chain, transport: Transport) -> Tensor:
    """Return the state that enters each of this rank's segments, `[B, P, H, K, V]`; differentiable in the summary.

    All ranks of the chain call it together, forward and backward.

    Args:
        summary: what this rank's segments do to a state: transition `[B, P, H, 1, 1]`, `[..., K, 1]` or `[..., K, K]`,
            state `[B, P, H, K, V]`, float32 or float64.
    """
    transition, state = summary.transition, summary.state
    segments = len(chain.places(transport.rank))
    assert transition.shape[:3] == state.shape[:3] and state.shape[1] == segments, (transition.shape, state.shape)
    assert transition.dtype == state.dtype in (torch.float32, torch.float64), (transition.dtype, state.dtype)
    return _PassStates.apply(transition, state, passing, chain, transport)  # type: ignore[no-untyped-call,no-any-return]


class _PassStates(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, transition: Tensor, state: Tensor, passing: StatePassing, chain: Chain, transport: Transport
    ) -> Tensor:
        states = passing.incoming(Affine(transition, state), chain=chain, transport=transport)
        ctx.save_for_backward(transition, states)
        ctx.arguments = passing, chain, transport
        return states

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, dstates: Tensor) -> tuple[Tensor | None, Tensor, None, None, None]:
        transition, states = ctx.saved_tensors
        passing, chain, transport = ctx.arguments
        back = Affine(transposed(transition), dstates)
        dstate = passing.incoming(back, chain=chain.reversed(), transport=transport)
        dtransition = _transition_gradient(dstate, states, like=transition) if ctx.needs_input_grad[0] else None
        return dtransition, dstate, None, None, None


def _transition_gradient(dstate: Tensor, states: Tensor, *, like: Tensor) -> Tensor:
    """Return E S^T `[..., K, K]`, or of it what a decay has: its diagonal `[..., K, 1]` or trace `[..., 1, 1]`."""
    if like.shape[-1] > 1:
        return dstate @ states.mT
    diagonal = (dstate * states).sum(-1, keepdim=True)
    return diagonal if like.shape[-2] == diagonal.shape[-2] else diagonal.sum(-2, keepdim=True)
