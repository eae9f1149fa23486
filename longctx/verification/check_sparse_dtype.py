"""Checks of one layer of each sparse kind as it is configured: the same set on all ranks, the error budget for that
set, twice the same, and bytes."""

from collections.abc import Sequence

import torch

from longctx.verification.attend import counted
from longctx.verification.bench import Bench
from longctx.verification.check_attention import LARGEST, max_error, rms_error
from longctx.verification.check_sparse import check_same, gathered, parameter
from longctx.verification.check_traffic import as_planned
from longctx.verification.report import Finding, none_wrong
from longctx.verification.small import Small
from longctx.verification.sparse_bytes import attended, planned
from longctx.verification.sparse_layer import (
    LOSS,
    OUT,
    LayerOutcome,
    LayerProblem,
    make_mixer,
    rounded,
    run_layer,
    run_whole,
    settings_of,
    sparse_kernel,
)
from longctx.verification.watch_sparse import Note, selections

_DRAWS = 8
_SHORT = {torch.float32: "f32", torch.bfloat16: "bf16"}
# Their gates and sums are made of what they pick, which no selection tells.
_PICKING = ("landmark", "sla")


def check_sparse_dtype(small: Small, bench: Bench, kind: str) -> list[Finding]:
    """Compare in the configured dtype and head size, and count what is sent."""
    dtype, head_dim = small.dtype, small.source.model.head_size
    kernel = sparse_kernel(small, kind, device=bench.device, dtype=dtype, head_dim=head_dim)
    problem = _drawn(small, kind)
    ours = run_layer(small, bench, kind, problem)
    findings = check_same(small, kind, ours, run_whole(small, problem, device=bench.device, backward=False), dtype)
    if dtype != torch.float64:
        findings += _budget(small, kind, problem, ours, kernel)
    again = run_layer(small, bench, kind, problem).tensors
    different = sum(int((again[name] != x).sum()) for name, x in ours.tensors.items())
    of = sum(x.numel() for x in ours.tensors.values())
    why = "the same inputs gave other bits: sums are made in the order of arrival, or by atomic additions"
    twice = none_wrong(f"{kind}: two runs, bits", different, of, kernel=kernel, why=why, unit="differ")
    return [*findings, twice, *_sent(small, kind, ours)]


def _drawn(small: Small, kind: str) -> LayerProblem:
    """Return a problem for which the truth in float64 picks the same blocks, where it cannot be told which to pick."""
    for seed in range(31, 31 + _DRAWS):
        problem = make_mixer(small, kind, batch=len(small.samples), seed=seed)
        if kind not in _PICKING or small.dtype == torch.float64:
            break
        both = [
            selections(run_whole(small, rounded(problem, dtype), backward=False).notes[0])
            for dtype in (small.dtype, torch.float64)
        ]
        if all(torch.equal(a.lo, b.lo) and torch.equal(a.hi, b.hi) for a, b in zip(*both, strict=True)):
            break
    return problem


def _budget(small: Small, kind: str, problem: LayerProblem, ours: LayerOutcome, kernel: str) -> list[Finding]:
    """Compare with float64, with torch's own error in the dtype as the measure: all attend to what ranks selected."""
    given = [gathered(small, kind, shards) for shards in zip(*(selections(notes) for notes in ours.notes), strict=True)]
    exact = run_whole(small, rounded(problem, torch.float64), given=given).tensors
    plain = run_whole(small, problem, given=given).tensors
    short = _SHORT[small.dtype]
    findings = []
    for name, expected in exact.items():
        if name == LOSS or not expected.abs().any():
            continue
        factor = 2.0 if name == OUT else 3.0
        error, torchs = rms_error(ours.tensors[name], expected), rms_error(plain[name], expected)
        largest, torchs_largest = max_error(ours.tensors[name], expected), max_error(plain[name], expected)
        word = name if name == OUT or name.removeprefix("d") in problem.inputs else parameter(name)
        findings.append(
            Finding(
                name=f"{kind}: {word}, {short}",
                measured=f"{error:.1e} (torch {torchs:.1e})",
                bound=f"<= {factor:g} x torch's",
                passed=error <= factor * torchs and largest <= LARGEST * torchs_largest,
                kernel=kernel,
                why=(
                    f"given the same selection, torch alone is off by {torchs:.1e} in this dtype (at most "
                    f"{torchs_largest:.1e}), this by {error:.1e} (at most {largest:.1e}): partial sums and summaries "
                    "must be float32"
                ),
            )
        )
    return findings


def _sent(small: Small, kind: str, ours: LayerOutcome) -> list[Finding]:
    """Compare what every rank sent with what was planned for it, in all and in parts."""
    if small.cp == 1:
        return []
    due = planned(small, ours.notes)
    sent = [counted(marks, [each.forward, each.backward]) for marks, each in zip(ours.marks, due, strict=True)]
    return [*_summaries(small, kind, ours.notes), *_kv(small, kind, ours), *as_planned(sent, kind + ": sent {}")]


def _summaries(small: Small, kind: str, notes: Sequence[Sequence[Note]]) -> list[Finding]:
    """Compare what routing tells with the closed formula: it depends on the length, not on who selects what."""
    told = settings_of(small, kind).summaries(
        tokens=small.total // small.cp,
        kv_heads=small.model.num_kv_heads,
        head_dim=small.source.model.head_size,
        dtype=small.dtype,
    )
    due = told.forward * (small.cp - 1) * len(small.samples)
    each = [sum(note.sent for note in mine if note.method.startswith("gather_")) for mine in notes]
    worst = max(each, key=lambda count: abs(count - due))
    return [
        Finding(
            name=f"{kind}: routing sent",
            measured=f"{worst:,} B per rank",
            bound=f"{due:,} B",
            passed=worst == due,
            why=f"of {told.what or 'nothing'}, to each of {small.cp - 1} others; by rank {each} bytes were sent",
        )
    ]


def _kv(small: Small, kind: str, ours: LayerOutcome) -> list[Finding]:
    """Compare K/V and their gradients of all ranks with what the chosen way was said to cost."""
    calls = attended(small, ours.notes)
    if not calls or calls[0].teams.count == 1:
        return []
    due = planned(small, ours.notes)
    sent = whole = cost = 0
    ways = set()
    for rank in range(small.cp):
        _, middle, after = ours.marks[rank]
        forward = sum(call.notes[rank].sent - (call.agreed(rank) + call.shared(rank)).forward.bytes for call in calls)
        others = due[rank].backward.bytes - sum(call.moved(rank).backward.bytes for call in calls)
        sent += forward + after.bytes - middle.bytes - others
    for member in range(calls[0].teams.size):
        for call in calls:
            rows, costs, way = call.notes[0].sizes["q"][0][0], call.costs(member), call.way(member)
            ways.add(way)
            whole, cost = whole + rows * costs.all, cost + rows * costs.of(way)  # type: ignore[arg-type]
    return [
        Finding(
            name=f"{kind}: K/V by {' and '.join(sorted(ways))}",
            measured=f"{sent:,} B of {whole:,}",
            bound=f"{cost:,} B",
            passed=sent == cost,
            why="what moves is chosen by these numbers (attention.kv_moves), and what was sent is another",
        )
    ]
