"""Leak probes of linear layers: change one token, and exactly the later tokens of its document move; ask for one
output's gradient, and exactly the earlier ones have one."""

import dataclasses

import torch
from torch import Tensor

from longctx.verification import truth
from longctx.verification.bench import Bench
from longctx.verification.check_data import where
from longctx.verification.check_leaks import BACKWARD, FORWARD, leak_finding, probed
from longctx.verification.recur import kernel_of, make_recurrence, recur, shape_of
from longctx.verification.report import Finding
from longctx.verification.small import Small

_PROBES = 48
_ROUNDING = 1e-12  # gradients of gates are differences of sums, which need not cancel to the last bit


def check_linear_leaks(small: Small, bench: Bench, kind: str) -> list[Finding]:
    """Probe token by token in float64, with gates that forget little."""
    shape = shape_of(small, kind, configured=False)
    kernel = kernel_of(shape, device=bench.device, dtype=torch.float64)
    tokens = probed(small, _PROBES)
    rows = torch.arange(len(tokens))
    one = make_recurrence(small, kind, shape, batch=1, seed=13, lasting=True)
    inputs = {
        name: x if x.dim() == 1 else x.repeat(len(tokens), *[1] * (x.dim() - 1)) for name, x in one.inputs.items()
    }
    dout = torch.zeros_like(one.dout).repeat(len(tokens), 1, 1, 1)
    dout[rows, tokens] = one.dout[0, tokens]
    problem = dataclasses.replace(one, inputs=inputs, dout=dout, dstate=torch.zeros_like(inputs["state"]))
    before = recur(small, bench, kind, shape, problem).tensors
    v = inputs["v"].clone()
    v[rows, tokens] += 512.0
    changed = dataclasses.replace(problem, inputs={**inputs, "v": v})
    after = recur(small, bench, kind, shape, changed, backward=False).tensors
    allowed = truth.before(small.attention, small.documents[0])[0]
    moved = (before["out"] != after["out"]).any(dim=-1)  # [row, position, head]
    seen_by = allowed[:, tokens].T[..., None].expand_as(moved)
    forward = leak_finding(small, f"{kind}: leak probes forward", moved, seen_by, tokens, kernel, FORWARD)
    sees = allowed[tokens][..., None].expand_as(moved)
    touched = (before["dv"] != 0).any(dim=-1)
    backward = leak_finding(small, f"{kind}: leak probes backward", touched, sees, tokens, kernel, BACKWARD)
    own = torch.zeros_like(sees)
    own[rows, tokens] = True
    strays = {
        name: _stray(before[f"d{name}"], own if name == "q" else sees) for name in inputs if name not in ("v", "state")
    }
    for name, stray in strays.items():
        if backward.passed and stray is not None and stray.any():
            row, place, _ = stray.nonzero()[0].tolist()
            why = f"d{name} of {where(small, place)} depends on the output at {where(small, int(tokens[row]))}"
            backward = dataclasses.replace(
                backward, measured=f"{int(stray.sum()):,} leaks in d{name}", passed=False, why=why
            )
    return [forward, backward]


def _stray(gradient: Tensor, allowed: Tensor) -> Tensor | None:
    """Return where a gradient is that must not be, bool `[row, position, head]`; None for a gradient of no token."""
    if gradient.dim() == 1:
        return None
    size = gradient.abs() if gradient.dim() == 3 else gradient.abs().amax(dim=-1)
    return (size > _ROUNDING * size.max()) & ~allowed
