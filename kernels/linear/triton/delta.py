"""The delta rule by Triton kernels: DeltaNet, gated DeltaNet, KDA; see `delta_prepare.py` for the formulas and letters.

Three differentiable steps: `_Factors`, what every chunk does to a state, all chunks side by side; `_Finish`, states and
outputs of the segments from the states that enter them; `_Summary`, what whole segments do to a state: the same scan,
from the identity without values, and from nothing with them.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longctx.kernels.linear.affine import Affine
from longctx.kernels.linear.contract import Cuts, gate_of
from longctx.kernels.linear.triton.chunks import chunk_documents, chunk_table
from longctx.kernels.linear.triton.decayed import WEAKEST, Problem, running_sums
from longctx.kernels.linear.triton.delta_prepare import factors_kernel, scores_kernel
from longctx.kernels.linear.triton.delta_prepare_backward import scores_backward_kernel, solve_backward_kernel
from longctx.kernels.linear.triton.delta_scan import (
    factors_gradient_kernel,
    output_kernel,
    scan_backward_kernel,
    scan_kernel,
)
from longctx.kernels.triton_common.launch import cdiv, launch
from longctx.kernels.triton_common.tile_table import Entry


def begin_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    g: Tensor | None,
    beta: Tensor,
    scale: float,
    cuts: Cuts,
    chunk_size: int,
    entry: Entry,
) -> "DeltaWork":
    """Take up a call of the delta rule, shapes as in `contract.py`, at most 64 tokens a chunk."""
    table = chunk_table(cuts.lengths, chunk_size, q.device)
    gate = "scalar" if gate_of(g) == "fixed" else gate_of(g)
    problem = Problem(gate, scale, table, chunk_documents(cuts, table), entry)
    gates = None
    if g is not None and gate == "scalar":
        gates, g = running_sums(g, table, q.shape[0]).detach(), g.expand(q.shape[:3])
    elif g is not None:
        g = g.clamp(min=WEAKEST).contiguous()
        gates = g.detach()
    tensors = (x.contiguous() for x in (q, k, v, beta))
    return DeltaWork(problem, *_Factors.apply(problem, gates, g, *tensors))  # type: ignore[no-untyped-call]


def _run(
    problem: Problem, kernel: Any, name: str, like: tuple[Tensor, Tensor], arguments: Mapping[str, Any], *blocks: str
) -> None:
    """Launch a kernel on every chunk and head, and on every block of K or V.

    Args:
        name: of its tile in the table.
        like: one tensor `[B, T, H, K]` and one `[B, T, H, V]`: the dims.
        arguments: its arguments but those that all of a call's kernels share.
        blocks: of which of `K` and `V` there is one program per block.
    """
    tile = problem.entry.tiles[name]
    shared = problem.arguments(*like, tile) | {"entering": problem.entering, "LEVELS": problem.rows.bit_length() - 1}
    taken = {key: value for key, value in shared.items() if key in kernel.arg_names} | dict(arguments)
    batch, _, heads, _ = like[0].shape
    grid = (problem.table.chunks, batch * heads, *(cdiv(shared[dim], shared["B" + dim]) for dim in blocks))
    launch(kernel, grid, taken, warps=tile.warps, stages=tile.stages)


def _run_scan(
    problem: Problem, kernel: Any, name: str, like: tuple[Tensor, Tensor], arguments: Mapping[str, Any]
) -> None:
    """Launch a scan on every segment and head, and on every block of V; arguments as for `_run`."""
    tile = problem.entry.tiles[name]
    counts = problem.table.per_segment
    shared = problem.arguments(*like, tile) | {"bounds": problem.table.bounds, "segments": len(counts)}
    taken = {key: value for key, value in shared.items() if key in kernel.arg_names} | dict(arguments)
    batch, _, heads, _ = like[0].shape
    grid = (batch * len(counts) * heads, cdiv(shared["V"], shared["BV"]))
    launch(kernel, grid, taken, warps=tile.warps, stages=tile.stages)


class DeltaWork:
    """The factors of a call's chunks, and what can be made of them; see `contract.LinearWork`."""

    def __init__(
        self, problem: Problem, qs: Tensor, a: Tensor, ks: Tensor, w: Tensor, u: Tensor, decays: Tensor
    ) -> None:
        self.problem, self.qs, self.a, self.factors = problem, qs, a, (ks, w, u, decays)

    def summary(self) -> Affine:
        """Return the segments' maps: transition `[B, P, H, K, K]`, state `[B, P, H, K, V]`."""
        return Affine(*_Summary.apply(self.problem, *self.factors))  # type: ignore[no-untyped-call]

    def finish(self, states: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return out `[B, T, H, V]` and the states `[B, P, H, K, V]` after the segments."""
        out, final = _Finish.apply(self.problem, states, self.qs, self.a, *self.factors)  # type: ignore[no-untyped-call]
        return out, final


class _Factors(torch.autograd.Function):
    """(g, q, k, v, beta) -> Q, A, K, W, U in q's dtype and D `[B, N, H, K]` in float32; kernels read g as `gates`."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        problem: Problem,
        gates: Tensor | None,
        g: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        beta: Tensor,
    ) -> tuple[Tensor, ...]:
        batch, tokens, heads, size = q.shape
        a = q.new_empty(batch, tokens, heads, problem.rows)
        t = torch.empty_like(a, dtype=torch.float32)
        inputs = {"q": q, "k": k, "gates": gates, "beta": beta}
        diagonal = "_diagonal" if problem.gate == "diagonal" else ""
        _run(problem, scores_kernel, "scores" + diagonal, (q, v), {**inputs, "a_out": a, "t_out": t})
        qs, ks, w, u = torch.empty_like(q), torch.empty_like(q), torch.empty_like(q), torch.empty_like(v)
        decays = q.new_empty(batch, problem.table.chunks, heads, size, dtype=torch.float32)
        made = {"qs": qs, "ks": ks, "w": w, "u": u, "decays": decays}
        _run(problem, factors_kernel, "factors", (q, v), {**inputs, "v": v, "t_in": t, **made})
        ctx.problem = problem
        ctx.save_for_backward(gates, q, k, v, beta, t)
        return qs, a, ks, w, u, decays

    @staticmethod
    @once_differentiable
    def backward(  # type: ignore[override]
        ctx: Any, dqs: Tensor, da: Tensor, dks: Tensor, dw: Tensor, du: Tensor, ddecays: Tensor
    ) -> tuple[Tensor | None, ...]:
        problem: Problem = ctx.problem
        gates, q, k, v, beta, t = ctx.saved_tensors
        dqs, da, dks, dw, du, ddecays = (x.contiguous() for x in (dqs, da, dks, dw, du, ddecays))
        dv, dlow, dbeta_of_v = torch.empty_like(v), torch.empty_like(t), torch.empty_like(t[..., 0])
        inputs = {"k": k, "gates": gates, "beta": beta, "t_in": t, "dw": dw}
        made: dict[str, Tensor | None] = {"dv": dv, "dbeta": dbeta_of_v, "dlow_out": dlow}
        _run(problem, solve_backward_kernel, "solve_backward", (q, v), {**inputs, "v": v, "du": du, **made})
        dq, dk, dbeta = torch.empty_like(q), torch.empty_like(k), torch.empty_like(beta)
        dg = None if gates is None else torch.empty_like(gates, dtype=torch.float32)
        given = {"da_in": da, "dlow_in": dlow, "dqs": dqs, "dks": dks, "ddecays": ddecays, "dbeta_of_v": dbeta_of_v}
        made = {"dq": dq, "dk": dk, "dbeta": dbeta, "dg": dg}
        diagonal = "_diagonal" if problem.gate == "diagonal" else ""
        _run(problem, scores_backward_kernel, "scores_backward" + diagonal, (q, v), {**inputs, "q": q, **given, **made})
        return None, None, dg, dq, dk, dv, dbeta


class _Finish(torch.autograd.Function):
    """(states that enter, Q, A, K, W, U, D) -> out, states after."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        problem: Problem,
        initial: Tensor | None,
        qs: Tensor,
        a: Tensor,
        ks: Tensor,
        w: Tensor,
        u: Tensor,
        decays: Tensor,
    ) -> tuple[Tensor, Tensor]:
        states = qs.new_empty(*decays.shape, u.shape[-1])
        x, out = torch.empty_like(u), torch.empty_like(u)
        final = _scan(problem, initial, ks, w, u, decays, keep=(states, x), wide=False)
        arguments = {"qs": qs, "a": a, "x": x, "states": states, "out": out}
        _run(problem, output_kernel, "output", (qs, u), arguments, "V")
        ctx.problem, ctx.initial = problem, initial is not None
        ctx.save_for_backward(qs, a, ks, w, decays, states, x)
        return out, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        problem: Problem = ctx.problem
        qs, a, ks, w, decays, states, x = ctx.saved_tensors
        dout = dout.contiguous()
        dinitial = torch.empty_like(dfinal, memory_format=torch.contiguous_format) if ctx.initial else None
        given = {"qs": qs, "a": a, "dout": dout, "dinitial": dinitial}
        dstates, dx = _scan_backward(problem, ks, w, decays, dfinal, given, wide=False)
        dqs, da = torch.empty_like(qs), torch.empty_like(a)
        dks, dw, ddecays = _factors_gradient(problem, ks, x, dx, states, dstates, {"dout": dout, "dqs": dqs, "da": da})
        return None, dinitial, dqs, da, dks, dw, dx, ddecays


class _Summary(torch.autograd.Function):
    """(K, W, U, D) -> transitions `[B, P, H, K, K]` and states `[B, P, H, K, V]`; all products are those of float32.

    What ranks multiply with each other must not carry the errors of 16 bits. Chunks' states are computed again in the
    backward: in float32 they would take more memory than everything else.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, problem: Problem, ks: Tensor, w: Tensor, u: Tensor, decays: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.problem = problem
        ctx.save_for_backward(ks, w, u, decays)
        return (
            _scan(problem, None, ks, w, None, decays, keep=None, wide=True),
            _scan(problem, None, ks, w, u, decays, keep=None, wide=True),
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtransition: Tensor, dstate: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        ks, w, u, decays = ctx.saved_tensors
        of_transition = _segment_backward(ctx.problem, ks, w, None, decays, dtransition)
        of_state = _segment_backward(ctx.problem, ks, w, u, decays, dstate)
        dks, dw, ddecays = (x + y for x, y in zip(of_transition[:3], of_state[:3], strict=True))
        return None, dks, dw, of_state[3], ddecays


def _segment_backward(
    problem: Problem, ks: Tensor, w: Tensor, u: Tensor | None, decays: Tensor, dfinal: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of K, W, D and U, all float32, of what a scan from nothing gives; u None: as `_scan`."""
    states = decays.new_empty(*decays.shape, dfinal.shape[-1])
    x = decays.new_empty(*w.shape[:3], dfinal.shape[-1])
    _scan(problem, None, ks, w, u, decays, keep=(states, x), wide=True)
    none = dict.fromkeys(("qs", "a", "dout", "dinitial"))
    dstates, dx = _scan_backward(problem, ks, w, decays, dfinal, none, wide=True)
    none = dict.fromkeys(("dout", "dqs", "da"))
    return *_factors_gradient(problem, ks, x, dx, states, dstates, none), dx


def _scan(
    problem: Problem,
    initial: Tensor | None,
    ks: Tensor,
    w: Tensor,
    u: Tensor | None,
    decays: Tensor,
    *,
    keep: tuple[Tensor, Tensor] | None,
    wide: bool,
) -> Tensor:
    """Return the states after the segments `[B, P, H, K, V]`; u None: from the identity, without values.

    keep: where to leave the states that enter chunks, and x.
    """
    like = ks, ks if u is None else u
    states, x = keep or (None, None)
    batch, _, heads, size = ks.shape
    final = decays.new_empty(batch, len(problem.table.per_segment), heads, size, like[1].shape[-1])
    arguments = {
        "ks": ks,
        "w": w,
        "u": u,
        "decays": decays,
        "initial": None if initial is None else initial.contiguous(),
        "states": states,
        "x_out": x,
        "final": final,
        "IDENTITY": u is None,
        "WIDE": wide,
    }
    _run_scan(problem, scan_kernel, "scan_wide" if wide else "scan", like, arguments)
    return final


def _scan_backward(
    problem: Problem,
    ks: Tensor,
    w: Tensor,
    decays: Tensor,
    dfinal: Tensor,
    given: Mapping[str, Tensor | None],
    *,
    wide: bool,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the states that leave the chunks, and of x; given: Q, A, dout, dinitial or None."""
    dtype = torch.float32 if wide else w.dtype
    dstates = w.new_empty(*decays.shape, dfinal.shape[-1], dtype=dtype)
    dx = w.new_empty(*w.shape[:3], dfinal.shape[-1], dtype=dtype)
    arguments = {"ks": ks, "w": w, "decays": decays, "dfinal": dfinal.contiguous(), "dstates": dstates, "dx_out": dx}
    name = "scan_backward_wide" if wide else "scan_backward"
    _run_scan(problem, scan_backward_kernel, name, (ks, dx), {**arguments, **given, "WIDE": wide})
    return dstates, dx


def _factors_gradient(
    problem: Problem,
    ks: Tensor,
    x: Tensor,
    dx: Tensor,
    states: Tensor,
    dstates: Tensor,
    outputs: Mapping[str, Tensor | None],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of K, W, in the dtype of x, and D; outputs: dout, and dQ and dA to be written, or None."""
    dks, dw = torch.empty_like(ks, dtype=x.dtype), torch.empty_like(ks, dtype=x.dtype)
    ddecays = x.new_empty(states.shape[:-1], dtype=torch.float32)
    arguments = {"x": x, "dx": dx, "states": states, "dstates": dstates, "dks": dks, "dw": dw, "ddecays": ddecays}
    name = "factors_gradient" if outputs["dout"] is not None else "factors_gradient_wide"
    _run(problem, factors_gradient_kernel, name, (ks, x), {**arguments, **outputs}, "K")
    return dks, dw, ddecays
