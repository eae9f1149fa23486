"""Checks of one layer of attention against dense attention: in float64, in the configured dtype, and twice the same."""

import torch
from torch import Tensor

from longctx.verification.attend import NAMES, Outcome, Problem, attend, dense, kernel_name, make_problem
from longctx.verification.bench import Bench
from longctx.verification.check_data import where
from longctx.verification.report import Finding, at_most, none_wrong
from longctx.verification.small import Small

EXACT = 1e-10
FACTORS = dict(zip(NAMES, (2.0, 2.0, 3.0, 3.0, 3.0, 3.0), strict=True))  # times the error of torch in the same dtype
# Of so few numbers the largest error is noise: a ratio of 3 is not rare, that of the rms stays below 1.6.
LARGEST = 10.0
_USUALLY = {
    "out": "the kernel ignores part of the mask, a hop is missing or doubled, or shards are merged wrongly",
    "lse": "the kernel ignores part of the mask, or hops are merged wrongly",
    "dq": "a hop is missing from the backward pass, or lse or delta there are not those merged over all hops",
    "dk": "the gradients of a hop's keys are lost, doubled, or come home to the wrong rank",
    "dv": "the gradients of a hop's values are lost, doubled, or come home to the wrong rank",
    "d(sink logits)": "it must be sum(-exp(sink - lse) delta) over all rows of all ranks",
}


def check_exact(small: Small, bench: Bench) -> list[Finding]:
    """Compare outputs and every gradient in float64, where only rounding may differ."""
    head_dim = small.model.head_size
    problem = make_problem(small, batch=1, head_dim=head_dim, seed=1)
    kernel = kernel_name(small, device=bench.device, dtype=torch.float64, head_dim=head_dim)
    ours = attend(small, bench, problem, small.masks[:1], wants_lse=True).tensors
    truth = dense(small, problem, small.allowed[0], dtype=torch.float64)
    findings = []
    for name, expected in truth.items():
        error = max_error(ours[name], expected)
        why = _USUALLY[name]
        if not error <= EXACT and name != NAMES[5]:
            why = f"{_where_wrong(small, name, ours[name], expected)}; usually {why}"
        findings.append(at_most(f"float64: {name} vs dense", error, EXACT, kernel=kernel, why=why))
    return findings


def check_dtype(small: Small, bench: Bench) -> tuple[list[Finding], Outcome]:
    """Compare in the configured dtype at the configured head size, with torch's own error there as the measure.

    Returns:
        The findings, and the outcome, whose bytes are those of training.
    """
    dtype, head_dim = small.dtype, small.source.model.head_size
    problem = make_problem(small, batch=1, head_dim=head_dim, seed=2).to(dtype)
    kernel = kernel_name(small, device=bench.device, dtype=dtype, head_dim=head_dim)
    outcome = attend(small, bench, problem, small.masks[:1])
    findings = []
    if dtype != torch.float64:
        short = str(dtype).removeprefix("torch.")
        truth = dense(small, problem, small.allowed[0], dtype=torch.float64)
        plain = dense(small, problem, small.allowed[0], dtype=dtype)
        for name, expected in truth.items():
            if name in ("lse", NAMES[5]):  # both are kept in float32, or a sum that is
                continue
            error, torchs = rms_error(outcome.tensors[name], expected), rms_error(plain[name], expected)
            largest, torchs_largest = max_error(outcome.tensors[name], expected), max_error(plain[name], expected)
            findings.append(
                Finding(
                    name=f"{short}: {name} vs float64, rms",
                    measured=f"{error:.1e} (torch {torchs:.1e})",
                    bound=f"<= {FACTORS[name]:g} x torch's",
                    passed=error <= FACTORS[name] * torchs and largest <= LARGEST * torchs_largest,
                    kernel=kernel,
                    why=(
                        f"in this dtype torch alone is off by {torchs:.1e} (at most {torchs_largest:.1e}), this by "
                        f"{error:.1e} (at most {largest:.1e}): partial sums must be merged in float32"
                    ),
                )
            )
    again = attend(small, bench, problem, small.masks[:1])
    different = sum(int((again.tensors[name] != x).sum()) for name, x in outcome.tensors.items())
    of = sum(x.numel() for x in outcome.tensors.values())
    why = "the same inputs gave other bits: sums are made in the order of arrival, or by atomic additions"
    findings.append(none_wrong("two runs, bit by bit", different, of, kernel=kernel, why=why, unit="differ"))
    return findings, outcome


def max_error(ours: Tensor, expected: Tensor) -> float:
    """Return max|ours - expected| in float64; equal infinities differ by 0, NaN gives NaN."""
    a, b = ours.double(), expected.double()
    return float(torch.where(a == b, 0.0, (a - b).abs()).max())


def rms_error(ours: Tensor, expected: Tensor) -> float:
    """Return the root of the mean square of `ours - expected` in float64."""
    return float((ours.double() - expected.double()).square().mean().sqrt())


def problem_of(small: Small, *, batch: int, head_dim: int, dtype: torch.dtype) -> Problem:
    """Return one problem repeated: every row of the batch is the same."""
    one = make_problem(small, batch=1, head_dim=head_dim, seed=3).to(dtype)
    q, k, v, dout = (x.expand(batch, -1, -1, -1).clone() for x in (one.q, one.k, one.v, one.dout))
    return Problem(q, k, v, dout, one.sink)


def _where_wrong(small: Small, name: str, ours: Tensor, expected: Tensor) -> str:
    """Say which positions are off and by whose hands."""
    wrong = ~((ours.double() - expected.double()).abs() <= EXACT) & (ours != expected)
    dims = (0, 1) if name == "lse" else (0, 2, 3)
    places = wrong.amax(dim=dims).nonzero().flatten().tolist()
    if not places:
        return "nothing but rounding is off"
    ranks = [r for r in range(small.cp) if set(small.layout.positions(r, small.total).tolist()) & set(places)]
    return f"{len(places)} of {small.total} positions are off, of cp ranks {ranks}; first {where(small, places[0])}"
