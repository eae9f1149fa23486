"""What segments do to states, where decays are all that happens to them: without outputs, a small part of their work.

    S' = exp(g_1 + ... + g_T) S + sum_j k_j exp(g_{j+1} + ... + g_T) v_j^T

Decays run up to the segment's end at once: their logarithms are sums of numbers <= 0, in which nothing cancels, as
nothing does in the gradient of a gate: the sum over all earlier tokens of k_j dk_j, and of the transition's. Tokens
count if they are of the segment's last document; a state goes through if it is of that document too.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longctx.kernels.linear.affine import Affine
from longctx.kernels.linear.contract import Cuts, gate_of
from longctx.kernels.linear.factors import NOTHING, factors
from longctx.kernels.precision import without_autocast

# Tokens times heads times batch of a step: what a core's cache holds; other devices count launches.
STEP_ON_CPU, STEP = 1 << 12, 1 << 20
LONGEST_SUM = 64  # tokens: sums of sums lose less than long ones


def decayed_summary(
    k: Tensor, v: Tensor, g: Tensor | None, *, cuts: Cuts, dtype: torch.dtype
) -> tuple[Affine, Tensor, Tensor]:
    """Return the maps of the segments, differentiable, and k and v for one further Function.

    That Function must make its gradients of k and v anew, for nobody else: ours are added to them in place. Two tensors
    of the size of k and v, and their sums, would take as long as the products.

    Args:
        k, v: `[B, T, H, K]`, `[B, T, H, V]`.
        g: None, `[H]`, `[B, T, H]` or `[B, T, H, K]`.
        dtype: of the maps, and of what is computed.
    """
    transition, state, k, v = _Summary.apply(cuts, dtype, k, v, g)
    return Affine(transition, state), k, v


class _Segment:
    """The tokens of one segment, some at a time, the last ones first.

    Attributes:
        whole: `[B, 1, H, 1 or K]`, the logarithm of the decay from the first token walked over on; None = no decays.
    """

    def __init__(self, cuts: Cuts, index: int, dtype: torch.dtype, k: Tensor, g: Tensor | None) -> None:
        self.cuts, self.dtype, self.k, self.g, self.gate = cuts, dtype, k, g, gate_of(g)
        self.step = max(1, (STEP_ON_CPU if k.device.type == "cpu" else STEP) // (k.shape[0] * k.shape[2]))
        self.first, self.end = self.cuts.bounds[index : index + 2]
        self.whole: Tensor | None = None
        self.through = None  # [R, 1, 1, 1]: whether the state that enters goes through
        if self.cuts.documents is not None and self.cuts.before is not None:
            last = self.cuts.documents[:, self.end - 1]
            self.through = (self.cuts.before[:, index] == last).to(self.dtype)[:, None, None, None]
            self.last = last[:, None]

    def __iter__(self) -> Iterator[tuple[slice, slice, Tensor | None]]:
        """Yield tokens, heads, and what their keys are multiplied by, `[B, t, h, 1 or K]` (None = nothing).

        Other heads and earlier tokens have decayed until nothing is left; looking for them would stall a device that
        works ahead.
        """
        for end in range(self.end, self.first, -self.step):
            part, heads = slice(max(self.first, end - self.step), end), slice(0, self.k.shape[2])
            sums, self.whole = self.log_decays(part, self.whole)
            if sums is not None and sums.device.type == "cpu":
                left = (sums.amax((0, 1, 3)) < NOTHING[self.dtype]).logical_not().nonzero().flatten().tolist()
                if not left:
                    return
                heads = slice(left[0], left[-1] + 1)
            yield part, heads, self.weights(part, sums if sums is None else sums[:, :, heads])

    def log_decays(self, part: slice, after: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Return the logarithms of decays from each token of a part to the segment's end, and of those before the part.

        Args:
            after: the latter for the part that follows; None = there is none.

        Returns:
            `[B, t, H, 1 or K]` and `[B, 1, H, 1 or K]`, B = 1 where rows are alike; None = no decays.
        """
        if self.g is None:
            return None, None
        if self.gate == "fixed":
            distance = torch.arange(self.end - 1 - part.start, self.end - 1 - part.stop, -1, device=self.g.device)
            g = self.g.to(self.dtype).clamp(min=-1e6)[None, None, :, None]  # -inf times no tokens would be NaN
            return g * distance[None, :, None, None], g * (self.end - part.start)
        g = self.g[:, part].to(self.dtype)
        g = g if self.gate == "diagonal" else g[..., None]
        after = torch.zeros_like(g[:, :1]) if after is None else after
        sums = torch.cat([g[:, 1:], after], dim=1).flip(1).cumsum(1).flip(1)
        return sums, sums[:, :1] + g[:, :1]

    def weights(self, part: slice, log_decays: Tensor | None) -> Tensor | None:
        """Return what a part's keys are multiplied by, `[B, t, H, 1 or K]`; None = nothing."""
        found = None if log_decays is None else factors(log_decays)
        if self.through is None:
            return found
        assert self.cuts.documents is not None
        seen = (self.cuts.documents[:, part] == self.last).to(self.dtype)[:, :, None, None]
        return seen if found is None else found * seen

    def transition(self) -> Tensor:
        """Return the transition `[B or 1, H, 1 or K, 1]` of what has been walked over."""
        found = self.k.new_ones(1, 1, 1, 1, dtype=self.dtype) if self.whole is None else factors(self.whole)
        return (found if self.through is None else found * self.through).movedim(1, -1)


class _Summary(torch.autograd.Function):
    """Forward and backward over the segments' tokens; of decays nothing is kept but the whole segments'."""

    @staticmethod
    def forward(ctx: Any, cuts: Cuts, dtype: torch.dtype, k: Tensor, v: Tensor, g: Tensor | None) -> tuple[Tensor, ...]:
        """Return transitions `[B, P, H, 1 or K, 1]`, states `[B, P, H, K, V]`, k and v."""
        ctx.cuts, ctx.dtype = cuts, dtype
        (batch, _, every, size), segments = k.shape, len(cuts.lengths)
        states = k.new_zeros(batch, segments, every, size, v.shape[-1], dtype=dtype)
        transitions = k.new_empty(batch, segments, every, size if gate_of(g) == "diagonal" else 1, 1, dtype=dtype)
        for index in range(segments):
            segment = _Segment(cuts, index, dtype, k, g)
            for part, heads, weights in segment:
                keys = _times(k[:, part, heads].to(dtype), weights)
                _add_products(states[:, index, heads], keys, v[:, part, heads].to(dtype))
            transitions[:, index] = segment.transition()
        ctx.save_for_backward(k, v, g, transitions)
        ctx.set_materialize_grads(False)
        return transitions, states, k.view_as(k), v.view_as(v)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(
        ctx: Any, dtransitions: Tensor | None, dstates: Tensor | None, dk: Tensor | None, dv: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients of k, v and g: added to those that came, where some did."""
        k, v, g, transitions = ctx.saved_tensors
        dk, dv = (torch.zeros_like(x) if dx is None else dx for x, dx in ((k, dk), (v, dv)))
        terms = None  # [B, T, H, 1 or K], what each key with the tokens after it has to do with their gates
        if g is not None and ctx.needs_input_grad[4]:
            terms = k.new_zeros(*k.shape[:3], transitions.shape[-2], dtype=ctx.dtype)
        for index in range(len(ctx.cuts.lengths) if dstates is not None else 0):
            assert dstates is not None
            segment = _Segment(ctx.cuts, index, ctx.dtype, k, g)
            for part, heads, weights in segment:
                keys, values = (x[:, part, heads].to(ctx.dtype) for x in (k, v))
                dk_part, dv_part, dstate = dk[:, part, heads], dv[:, part, heads], dstates[:, index, heads]
                dkeys = _rows_times(values, dstate.mT)
                if terms is None:
                    _add(dk_part, dkeys, weights)
                else:
                    dkeys = _times(dkeys, weights)
                    dk_part += dkeys
                    own = keys * dkeys
                    terms[:, part, heads] = own if segment.gate == "diagonal" else own.sum(-1, keepdim=True)
                if segment.gate == "diagonal":
                    dv_part += _rows_times(_times(keys, weights), dstate)
                else:
                    _add(dv_part, _rows_times(keys, dstate), weights)
        if terms is None:
            return None, None, dk, dv, None
        whole = torch.zeros_like(transitions) if dtransitions is None else dtransitions * transitions
        return None, None, dk, dv, _gradient_of_gates(ctx.cuts, g, terms, whole)


def _gradient_of_gates(cuts: Cuts, g: Tensor, terms: Tensor, whole: Tensor) -> Tensor:
    """Return the gradient of g: of each gate the `terms [B, T, H, D]` of the tokens before it, and the transition's.

    Args:
        whole: `[B, P, H, D, 1]`, the gradients of the logarithms of the transitions.
    """
    pieces = []
    for index, length in enumerate(cuts.lengths):
        own, through = terms[:, cuts.bounds[index] : cuts.bounds[index + 1]], whole[:, None, index, :, :, 0]
        if g.dim() == 1:
            distance = torch.arange(length - 1, -1, -1, device=g.device, dtype=terms.dtype)[:, None, None]
            pieces.append((own * distance).sum((0, 1, 3)) + length * through.sum((0, 1, 3)))
        else:
            pieces.append(torch.cat([through, own[:, :-1]], dim=1).cumsum(1))
    if g.dim() == 1:
        return torch.stack(pieces).sum(0).to(g.dtype)
    return torch.cat(pieces, dim=1).view(g.shape).to(g.dtype)


def _add_products(states: Tensor, keys: Tensor, values: Tensor) -> None:
    """Add the sums over t of `keys [B, t, H, K]` times `values [B, t, H, V]` to `states [B, H, K, V]`."""
    for state, own_keys, own_values in zip(states, keys, values, strict=True):
        for some, its in zip(own_keys.split(LONGEST_SUM), own_values.split(LONGEST_SUM), strict=True):
            torch.baddbmm(state, some.permute(1, 2, 0), its.transpose(0, 1), out=state)


def _rows_times(x: Tensor, matrix: Tensor) -> Tensor:
    """Return `x [B, t, H, K] @ matrix [B, H, K, V]` as `[B, t, H, V]`."""
    return (x.transpose(1, 2) @ matrix).transpose(1, 2)


def _times(x: Tensor, factor: Tensor | None) -> Tensor:
    return x if factor is None else x * factor


def _add(total: Tensor, x: Tensor, factor: Tensor | None) -> None:
    """Add the product in place."""
    if factor is None:
        total += x
    elif total.dtype == x.dtype:
        total.addcmul_(x, factor)
    else:
        total += x * factor
