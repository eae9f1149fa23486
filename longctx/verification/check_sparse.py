"""Checks of one layer of each sparse kind in float64: against a whole sequence on one rank, output and every gradient;
and of what it selects, against one rank and against the words of its settings."""

from collections.abc import Sequence

import torch
from torch import Tensor

from longctx.kernels.block_sparse.selection import Selection, allowed
from longctx.verification import truth_sparse
from longctx.verification.bench import Bench
from longctx.verification.check_attention import EXACT, max_error
from longctx.verification.check_data import where
from longctx.verification.report import Finding, at_most, none_wrong
from longctx.verification.small import Small
from longctx.verification.sparse_layer import (
    LOSS,
    OUT,
    LayerOutcome,
    document_starts,
    make_layer,
    run_layer,
    run_whole,
    settings_of,
    sparse_kernel,
)
from longctx.verification.watch_sparse import selections

_USUALLY = {
    OUT: "selected keys do not arrive, parts are merged wrongly, or another set was selected (see the next lines)",
    "dx": "gradients of selected keys or of gathered summaries do not come home, or come home twice",
}


def check_sparse(small: Small, bench: Bench, kind: str) -> list[Finding]:
    """Compare outputs, losses, every gradient and the selections in float64."""
    problem = make_layer(small, kind, batch=len(small.samples), seed=21)
    kernel = sparse_kernel(small, kind, device=bench.device, dtype=torch.float64, head_dim=small.model.head_size)
    ours, whole = run_layer(small, bench, kind, problem), run_whole(small, problem)
    findings, projections = [], dict[str, float]()
    for name, expected in whole.tensors.items():
        scale = max(float(expected.abs().max()), 1e-3)
        got = ours.tensors.get(name, torch.full_like(expected, float("nan")))  # a loss may be lost
        error = max_error(got, expected) / scale
        if name in (OUT, "dx"):
            why = _where_wrong(small, kind, got, expected, scale) + _USUALLY[name]
            findings.append(at_most(f"{kind}: {name} vs one rank", error, EXACT, kernel=kernel, why=why))
        elif name == LOSS or name.startswith("sparse.") or name == "sink_logits":
            word = "its own loss" if name == LOSS else parameter(name)
            why = "every rank has the share of its own tokens, and together they are one rank's"
            findings.append(at_most(f"{kind}: {word}", error, EXACT, kernel=kernel, why=why))
        else:
            projections[name] = error
    worst = max(projections, key=lambda name: _nan_last(projections[name]))
    why = f"the gradient of {worst} is off; if dx is too, look there first"
    findings.append(at_most(f"{kind}: d projections", projections[worst], EXACT, kernel=kernel, why=why))
    return [*findings, *check_same(small, kind, ours, whole, torch.float64), *_pairs(small, kind, ours)]


def parameter(name: str) -> str:
    """Return what to call the gradient of a parameter."""
    return f"d {name.removeprefix('sparse.').removesuffix('.weight').removesuffix('_logits')}"


def check_same(small: Small, kind: str, ours: LayerOutcome, whole: LayerOutcome, dtype: torch.dtype) -> list[Finding]:
    """Compare what all ranks selected with what one rank selects, bit by bit."""
    calls = [selections(notes) for notes in (*ours.notes, *whole.notes)]
    if not calls[-1]:
        return []  # nothing is selected: dense attention, to distill
    wrong = of = 0
    first: int | None = None
    for *shards, one in zip(*calls, strict=True):
        together = gathered(small, kind, shards)
        for got, want in zip(together.parts(), one.parts(), strict=True):
            different = _different(got, want)  # [R, T, HS, S]
            wrong, of = wrong + int(different.sum()), of + different.numel()
            if different.any() and first is None:
                first = int(different.nonzero()[0, 1])
        wrong += sum(_other_classes(part, one) for part in shards)
    where_first = "" if first is None else f"first by the query at {where(small, first)}. "
    why = (
        f"{where_first}Summaries of all blocks must be on every rank, with the same bits, and scores made by products "
        "whose shapes do not depend on the number of ranks"
    )
    return [none_wrong(f"{kind}: set in {str(dtype).removeprefix('torch.')}", wrong, of, why=why, unit="differ")]


def gathered(small: Small, kind: str, shards: Sequence[Selection]) -> Selection:
    """Return the selection of a whole sequence, of those of all ranks."""
    layout = small.layouts[small.layers.kinds.index(kind)]

    def whole(tensors: Sequence[Tensor | None]) -> Tensor | None:
        there = [x for x in tensors if x is not None]
        return layout.unshard(there, dim=1) if there else None

    lo, hi = whole([part.lo for part in shards]), whole([part.hi for part in shards])
    assert lo is not None and hi is not None
    besides = [part.beside for part in shards if part.beside is not None]
    return Selection(
        lo=lo,
        hi=hi,
        slot_class=whole([part.slot_class for part in shards]),
        key_class=shards[0].key_class,
        block_size=shards[0].block_size,
        beside=gathered(small, kind, besides) if besides else None,
    )


def _pairs(small: Small, kind: str, ours: LayerOutcome) -> list[Finding]:
    """Compare what is selected with what the settings show or, where data decides, with what they could show."""
    settings = settings_of(small, kind)
    heads, kv_heads = small.model.num_heads, small.model.num_kv_heads
    found = []
    for shards in zip(*(selections(notes) for notes in ours.notes), strict=True):
        seen = allowed(gathered(small, kind, shards), torch.arange(small.total))
        found.append(seen.repeat_interleave(heads // seen.shape[1], dim=1))  # [R, H, T, T]
    if not found:
        return []
    wrong = of = selected = causal = 0
    for row, documents in enumerate(_documents(small)):
        inside = truth_sparse.inside(documents)
        expected = truth_sparse.static_pairs(settings, documents, heads=heads, kv_heads=kv_heads)
        for seen in found:
            one = seen[row if len(seen) > 1 else 0]
            if expected is not None:
                bad = one != expected
            else:  # nothing of others, nothing later, and itself
                bad = one & ~inside
                if truth_sparse.causal(settings):
                    bad |= ~one & torch.eye(small.total, dtype=torch.bool)
            wrong, of = wrong + int(bad.sum()), of + bad.numel()
            selected, causal = selected + int(one.sum()), causal + int(inside.sum()) * heads
    static = truth_sparse.static_pairs(settings, small.documents[0], heads=heads, kv_heads=kv_heads) is not None
    what = "as set" if static else "possible"
    why = (
        "the pattern shows other pairs than its settings say"
        if static
        else "a query selects keys of another document, or later than itself, or does not see itself"
    )
    share = Finding(name=f"{kind}: pairs selected", measured=f"{selected / causal:.0%} of causal ones", passed=None)
    return [none_wrong(f"{kind}: pairs {what}", wrong, of, why=why), share]


def _documents(small: Small) -> list[Tensor]:
    """Return the first position of what each token may see: as good as a number for each document."""
    return [document_starts(small, documents) for documents in small.documents]


def _different(got: Selection, want: Selection) -> Tensor:
    """Return which slots are not the same, bool `[R, T, HS, S]`."""
    rows = max(got.rows, want.rows)
    different = torch.zeros(rows, *want.lo.shape[1:], dtype=torch.bool)
    for a, b in ((got.lo, want.lo), (got.hi, want.hi), (got.slot_class, want.slot_class)):
        if a is None or b is None or a.shape[1:] != b.shape[1:]:
            different |= (a is None) != (b is None) or (a is not None and b is not None)
        else:
            different |= a != b
    return different


def _other_classes(part: Selection, want: Selection) -> int:
    """Count keys that a rank knows another class of."""
    pairs = zip(part.parts(), want.parts(), strict=True)
    return sum(
        int((a.key_class != b.key_class).sum()) for a, b in pairs if a.key_class is not None and b.key_class is not None
    )


def _where_wrong(small: Small, kind: str, ours: Tensor, expected: Tensor, scale: float) -> str:
    """Say which positions are off and by whose hands, if some are."""
    wrong = ~((ours - expected).abs() <= EXACT * scale)
    rows, places = wrong.flatten(2).any(-1).nonzero().T.tolist()
    if not places:
        return ""
    layout = small.layouts[small.layers.kinds.index(kind)]
    ranks = [r for r in range(small.cp) if set(layout.positions(r, small.total).tolist()) & set(places)]
    first = f"{where(small, places[0], layout, row=rows[0])} of sequence {rows[0]}"
    off = f"{len(places)} of {wrong.shape[0] * small.total} positions are off, of cp ranks {ranks}"
    return f"{off}; first {first}; usually "


def _nan_last(error: float) -> float:
    return float("inf") if error != error else error
