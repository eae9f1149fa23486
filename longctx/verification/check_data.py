"""Checks of what a rank is given: its tokens, positions, labels and mask, against the corpus and the config's words."""

import math

import torch
from torch import Tensor

from longctx.attention import ContextParallelAttention
from longctx.batch import shard_samples
from longctx.kernels.mask import plain_masks
from longctx.parallel.layout import Layout
from longctx.parallel.transport import Transport
from longctx.rope import rope_table
from longctx.stack import Stack, build_stack
from longctx.verification.bench import Bench
from longctx.verification.report import Finding, at_most, none_wrong
from longctx.verification.small import Small


def check_data(small: Small, bench: Bench) -> list[Finding]:
    """Check layout, positions, tokens, labels and masks."""

    def shards(transport: Transport) -> dict[str, Tensor]:
        stack = stack_of(small, transport)
        batch = shard_samples(small.samples, stack=stack, device=bench.device)
        positions = [batch.plan.positions[layout] for layout in (stack.first, stack.last)]
        return {
            "tokens": batch.tokens,
            "labels": batch.labels,
            "first": positions[0],
            "last": positions[1],
            "count": torch.tensor(batch.num_labels),
        }

    ranks = bench.run(shards)
    first, last = (torch.cat([rank[name] for rank in ranks]) for name in ("first", "last"))
    return [
        *(_round_trip(small, layout) for layout in dict.fromkeys(small.layouts)),
        _positions(small, first, last),
        _in_place(small, "tokens", [rank["tokens"] for rank in ranks], first, torch.stack(small.tokens)),
        *_labels(small, ranks, last),
        *(_masks(small, kind) for kind in small.layers.softmax_kinds),
        _rope(small),
    ]


def attention_of(small: Small, transport: Transport, dtype: torch.dtype) -> ContextParallelAttention:
    """Return the attention that training would use, of one rank."""
    return ContextParallelAttention(
        layout=small.layout, schedule=small.schedule, transport=transport, kernel=kernel_for(small, dtype)
    )


def kernel_for(small: Small, dtype: torch.dtype) -> str:
    """Return the configured kernel by name; in another dtype than the configured one that has it."""
    return small.source.attention.kernel if dtype == small.dtype else small.attention.kernel


def stack_of(small: Small, transport: Transport) -> Stack:
    """Return the layers that training would use, of one rank."""
    return build_stack(
        small.attention,
        layers=small.layers,
        model=small.model,
        total=small.total,
        dtype=torch.float64,
        transport=transport,
        per_machine=small.per_machine,
    )


def where(small: Small, position: int, layout: Layout | None = None, *, row: int = 0) -> str:
    """Return a position of a sample in words; `layout` is that of softmax layers unless another is given."""
    document, layout = int(small.documents[row][position]), layout or small.layout
    rank = next(r for r in range(small.cp) if position in layout.positions(r, small.total).tolist())
    return f"position {position} (document {document}, cp rank {rank})"


def _round_trip(small: Small, layout: Layout) -> Finding:
    """Shard numbers that are their own positions; the integers of `segments` and the tensors must tell the same."""
    whole = torch.arange(small.total)
    shards = [layout.shard(whole, rank=rank, dim=0) for rank in range(small.cp)]
    segments = [
        torch.cat([s.start + s.stride * torch.arange(s.count) for s in layout.segments(rank, small.total)])
        for rank in range(small.cp)
    ]
    wrong = sum(_different(a, b) for a, b in zip(shards, segments, strict=True))
    wrong += _different(layout.unshard(shards, dim=0), whole)
    wrong += _different(torch.cat(segments).sort().values, whole)
    why = (
        "tokens that are cut by the layout and put back do not come back in place, are owned twice or by no rank, or "
        "Layout.positions (which cuts tensors) and Layout.segments (which plans) tell different positions"
    )
    name = "layout" if len(set(small.layouts)) == 1 else f"layout {layout.name}"
    return none_wrong(f"{name}: round trip", wrong, small.total, why=why)


def _positions(small: Small, first: Tensor, last: Tensor) -> Finding:
    wrong = 0
    for positions, layout in ((first, small.layouts[0]), (last, small.layouts[-1])):
        expected = torch.cat([layout.positions(rank, small.total) for rank in range(small.cp)])
        wrong = max(wrong, _different(positions, expected))
        wrong = max(wrong, _different(positions.sort().values, torch.arange(small.total)))
    why = (
        "the positions that RoPE gets on the ranks are not those of the tokens: every shard must have GLOBAL positions"
    )
    return none_wrong("positions for RoPE", wrong, small.total, why=why)


def _in_place(
    small: Small, name: str, shards: list[Tensor], positions: Tensor, expected: Tensor, *, hint: str = ""
) -> Finding:
    """Compare shards, put to their own positions, with the whole."""
    got = torch.full_like(expected, -1)
    got[:, positions] = torch.cat(shards, dim=1)
    wrong = got != expected
    why = ""
    if wrong.any():
        row, place = wrong.nonzero()[0].tolist()
        why = (
            f"first in sequence {row} at {where(small, place) if row == 0 else f'position {place}'}: got "
            f"{int(got[row, place])}, must be {int(expected[row, place])}{hint}"
        )
    return none_wrong(name, int(wrong.sum()), expected.numel(), why=why)


def _labels(small: Small, ranks: list[dict[str, Tensor]], positions: Tensor) -> list[Finding]:
    expected = torch.stack(small.labels)
    labels = [rank["labels"] for rank in ranks]
    hint = (
        "; labels must be shifted before they are sharded, and ignored at a document's end and where they are visible"
    )
    counted, real = sum(int(rank["count"]) for rank in ranks), int((expected >= 0).sum())
    why = "losses are divided by this count, summed over ranks: it must be that of the labels, wherever they lie"
    return [
        _in_place(small, "labels: the next token", labels, positions, expected, hint=hint),
        Finding(
            name="labels: count over ranks", measured=f"{counted:,}", bound=f"{real:,}", passed=counted == real, why=why
        ),
    ]


def _masks(small: Small, kind: str) -> Finding:
    """Compare the mask algebra's own definition with the config's words; HeadMasks head by head."""
    name = "mask: pairs as configured" if len(small.layers.softmax_kinds) == 1 else f"mask of {kind}: pairs"
    small = small.of_kind(kind)
    place = torch.arange(small.total)
    wrong = of = 0
    why = ""
    for row, (mask, seen) in enumerate(zip(small.masks, small.allowed, strict=True)):
        got = torch.stack([one.allowed(place, place, total=small.total) for one in plain_masks(mask)])
        bad = got != seen
        wrong, of = wrong + int(bad.sum()), of + bad.numel()
        if bad.any() and not why:
            head, q, k = bad.nonzero()[0].tolist()
            sees = "sees" if got[head, q, k] else "does not see"
            why = (
                f"first in sequence {row}, mask {head}: query {q} {sees} key {k} (documents, windows, chunks, prefix?)"
            )
    return none_wrong(name, wrong, of, why=why)


def _rope(small: Small) -> Finding:
    """Compare cosines and sines at the end of a sequence of the configured length with the formula."""
    model, last = small.source.model, small.source.data.seq_len - 1
    places = [last, max(last - 1, 0), last // 2]
    table = rope_table(torch.tensor(places), head_dim=model.head_size, theta=model.rope_theta)
    rates = [model.rope_theta ** (-2 * i / model.head_size) for i in range(model.head_size // 2)]
    errors = [
        abs(float(table[part][row, i]) - function(place * rate))
        for part, function in enumerate((math.cos, math.sin))
        for row, place in enumerate(places)
        for i, rate in enumerate(rates)
    ]
    why = "angles must be computed in float64: position x frequency does not fit in 24 bits"
    return at_most(f"RoPE at position {last:,}", max(errors), 1e-6, why=why)


def _different(a: Tensor, b: Tensor) -> int:
    return int((a != b).sum()) if a.shape == b.shape else max(a.numel(), b.numel())
