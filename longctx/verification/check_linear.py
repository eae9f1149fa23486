"""Checks of one layer of each linear kind against the recurrence: in float64, in the configured dtype, and twice the
same; and of the states that are sent."""

import dataclasses

import torch

from longctx.kernels.merge import accumulator_dtype
from longctx.verification import truth
from longctx.verification.attend import Outcome
from longctx.verification.bench import Bench
from longctx.verification.check_attention import EXACT, LARGEST, max_error, rms_error
from longctx.verification.check_data import where
from longctx.verification.check_traffic import as_planned
from longctx.verification.recur import kernel_of, make_recurrence, recur, recurred, shape_of
from longctx.verification.report import Finding, at_most, none_wrong
from longctx.verification.small import Small

_WHOLE = ("state", "dstate")  # not by token; dg neither where the decay is fixed
_USUALLY = {
    "out": "a wrong state enters a segment, or the kernel goes on with it across the begin of a document",
    "state": "the last segment's map is wrong, or not that of the rank which has the last token",
    "dq": "the states that enter are not those of the forward pass",
    "dk": "gradients of states do not come back from the ranks that follow",
    "dv": "gradients of states do not come back from the ranks that follow",
    "dg": "the gradient of a segment's transition, dM = E S^T, is lost",
    "dbeta": "the gradient of a segment's transition, dM = E S^T, is lost",
    "dstate": "the gradient of the state before the sequence is the first rank's alone",
}


def check_linear(small: Small, bench: Bench, kind: str) -> list[Finding]:
    """Compare outputs, the last state and every gradient in float64, where only rounding may differ."""
    shape = shape_of(small, kind, configured=False)
    kernel = kernel_of(shape, device=bench.device, dtype=torch.float64)
    problem = make_recurrence(small, kind, shape, batch=len(small.samples), seed=11)
    ours = recur(small, bench, kind, shape, problem).tensors
    findings = []
    for name, expected in recurred(small, problem, dtype=torch.float64).items():
        scale = max(float(expected.abs().max()), 1.0)
        error = max_error(ours[name], expected) / scale
        why = _USUALLY[name]
        if not error <= EXACT and name not in _WHOLE and expected.dim() > 1:
            wrong = ~((ours[name] - expected).abs() <= EXACT * scale)
            rows, places = wrong.flatten(2).any(-1).nonzero().T.tolist()
            ranks = [r for r in range(small.cp) if set(small.states.positions(r, small.total).tolist()) & set(places)]
            first = f"{where(small, places[0], small.states, row=rows[0])} of sequence {rows[0]}"
            off = f"{len(places)} of {len(small.samples) * small.total} positions are off, of cp ranks {ranks}"
            why = f"{off}; first {first}; usually {why}"
        findings.append(at_most(f"{kind}: {name} vs recurrence", error, EXACT, kernel=kernel, why=why))
    return findings


def check_linear_dtype(small: Small, bench: Bench, kind: str) -> list[Finding]:
    """Compare in the configured dtype and sizes, with the recurrence's own error there as the measure; count bytes."""
    shape, dtype = shape_of(small, kind, configured=True), small.dtype
    kernel = kernel_of(shape, device=bench.device, dtype=dtype)
    problem = make_recurrence(small, kind, shape, batch=len(small.samples), seed=12).to(dtype)
    outcome = recur(small, bench, kind, shape, problem)
    findings = []
    if dtype != torch.float64:
        short = str(dtype).removeprefix("torch.")
        exact, plain = (recurred(small, problem, dtype=each) for each in (torch.float64, dtype))
        for name, expected in exact.items():
            factor = 2.0 if name in ("out", "state") else 3.0
            error, torchs = rms_error(outcome.tensors[name], expected), rms_error(plain[name], expected)
            largest, torchs_largest = max_error(outcome.tensors[name], expected), max_error(plain[name], expected)
            findings.append(
                Finding(
                    name=f"{kind}: {name}, {short}",
                    measured=f"{error:.1e} (torch {torchs:.1e})",
                    bound=f"<= {factor:g} x torch's",
                    passed=error <= factor * torchs and largest <= LARGEST * torchs_largest,
                    kernel=kernel,
                    why=(
                        f"the recurrence in this dtype is off by {torchs:.1e} (at most {torchs_largest:.1e}), this by "
                        f"{error:.1e} (at most {largest:.1e}): states and transitions must be float32"
                    ),
                )
            )
    again = recur(small, bench, kind, shape, problem).tensors
    different = sum(int((again[name] != x).sum()) for name, x in outcome.tensors.items())
    of = sum(x.numel() for x in outcome.tensors.values())
    why = "the same inputs gave other bits: sums are made in the order of arrival, or by atomic additions"
    twice = none_wrong(f"{kind}: two runs, bit by bit", different, of, kernel=kernel, why=why, unit="differ")
    return [*findings, twice, *as_planned(outcome.sent, kind + ": states sent {}"), *_textbook(small, kind, outcome)]


def _textbook(small: Small, kind: str, outcome: Outcome) -> list[Finding]:
    """Compare the bytes of all ranks with the papers', where each rank has one run of tokens."""
    shape, wide = shape_of(small, kind, configured=True), accumulator_dtype(small.dtype).itemsize
    one = dataclasses.replace(shape, recurrences=shape.recurrences[:1])
    wide *= len(small.samples)
    due = truth.textbook_states(
        small.passing.name, ranks=small.cp, state=one.state_size * wide, transition=one.transition_size * wide
    )
    if due is None or small.cp == 1 or small.states.name != "contiguous":
        return []
    forward, backward = (sum(sum(sent[index].bytes_to.values()) for sent in outcome.sent) for index in range(2))
    return [
        Finding(
            name=f"{kind}: states, textbook",
            measured=f"{forward:,} + {backward:,} B",
            bound=f"2 x {due:,} B",
            passed=forward == backward == due,
            why=f"{small.passing.name} sends as much for any number of tokens, and in both passes",
        )
    ]
