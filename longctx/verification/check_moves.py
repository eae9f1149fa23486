"""Checks of tokens that move for linear layers: the halos of short convolutions, and relayouts of hidden states."""

from itertools import pairwise

import torch
from torch import Tensor

from longctx.parallel.halo import halo_sent
from longctx.parallel.layout import Layout
from longctx.parallel.relayout import relayout, relayout_sent
from longctx.parallel.transport import Transport
from longctx.verification import truth
from longctx.verification.attend import Counted, counted, mark
from longctx.verification.bench import Bench
from longctx.verification.check_attention import EXACT, max_error
from longctx.verification.check_data import stack_of
from longctx.verification.check_leaks import FORWARD, leak_finding, probed
from longctx.verification.check_traffic import as_planned
from longctx.verification.recur import shape_of
from longctx.verification.report import Finding, at_most, none_wrong
from longctx.verification.small import Small

_PROBES = 48


def check_convolution(small: Small, bench: Bench, kind: str) -> list[Finding]:
    """Compare a kind's convolution and its gradients with sums over shifted tokens; probe it; count its halos."""
    shape = shape_of(small, kind, configured=False)
    documents = small.documents[0] if small.attention.documents else torch.zeros_like(small.documents[0])
    generator = torch.Generator().manual_seed(14)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    x, dout = normal(1, small.total, shape.channels), normal(1, small.total, shape.channels)
    weight = normal(shape.channels, shape.taps)
    ours, sent = _convolve(small, bench, kind, x, weight, dout)
    leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    want = truth.convolution(leaves[0], leaves[1], documents)
    grads = torch.autograd.grad(want, leaves, dout)
    findings = [
        at_most(f"{kind}: convolution, {name}", max_error(got, expected), EXACT, why=_USUALLY[name])
        for name, got, expected in zip(("out", "dx", "dweight"), ours, (want.detach(), *grads), strict=True)
    ]
    tokens = probed(small, _PROBES)
    rows = torch.arange(len(tokens))
    one = x[..., :1].repeat(len(tokens), 1, 1)
    changed = one.clone()
    changed[rows, tokens] += 512.0
    before, after = (_convolve(small, bench, kind, each, weight[:1], None)[0][0] for each in (one, changed))
    place = torch.arange(small.total)
    near = place[:, None] - place[None, :]
    sees = truth.before(small.attention, small.documents[0])[0] & (near < shape.taps)
    moved = before != after
    probes = leak_finding(
        small, f"{kind}: convolution, probes", moved, sees[:, tokens].T[..., None], tokens, "", FORWARD
    )
    return [*findings, probes, *as_planned(sent, kind + ": halo sent {}")]


def check_relayouts(small: Small, bench: Bench) -> list[Finding]:
    """Move numbers between the layouts of neighbouring layers, and their gradients back; count bytes."""
    findings = []
    for source, target in dict.fromkeys((a, b) for a, b in pairwise(small.layouts) if a != b):
        whole = (torch.arange(2 * small.total * 3) % 251).to(small.dtype).view(2, small.total, 3)  # exact in 16 bits
        name = f"relayout to {target.name}"
        wrong, sent = _move(small, bench, source, target, whole)
        why = "a token or a gradient is not where the layout says: routes, or what is sent where"
        findings.append(none_wrong(f"{name}: tokens", wrong, 2 * whole.numel(), why=why))
        findings += as_planned(sent, name + ": {}")
    return findings


_USUALLY = {
    "out": "a run's halo is missing, stale, or reaches into another document",
    "dx": "the gradients of halos do not come home to the tokens' owners, or come twice",
    "dweight": "every rank has the share of its own tokens, and none of its halos'",
}


def _convolve(
    small: Small, bench: Bench, kind: str, x: Tensor, weight: Tensor, dout: Tensor | None
) -> tuple[list[Tensor], list[list[Counted]]]:
    """Return out, dx, dweight of all ranks together (out alone without a gradient), and what each rank sent."""
    layout, shape = small.states, shape_of(small, kind, configured=False)

    def work(transport: Transport) -> tuple[list[Tensor], list[Counted]]:
        linear = stack_of(small, transport).linear[kind]
        bounds = [small.samples[0].cu_seqlens] if small.attention.documents else None
        plan = linear.plan(bounds, total=small.total, device=bench.device)
        own = layout.shard(x, rank=transport.rank, dim=1).to(bench.device).requires_grad_()
        taps = weight.to(bench.device, copy=True).requires_grad_()
        row = x.shape[0] * x.shape[2] * x.element_size()
        planned = halo_sent(layout, rank=transport.rank, total=small.total, reach=shape.taps - 1, row_bytes=row)
        marks = [mark(transport)]
        out = linear.convolve(own, taps, plan=plan)
        marks.append(mark(transport))
        if dout is None:
            return [out.detach()], []
        given = layout.shard(dout, rank=transport.rank, dim=1).to(bench.device)
        grads = torch.autograd.grad(out, [own, taps], given)
        marks.append(mark(transport))
        return [out.detach(), *grads], counted(marks, planned)

    ranks = bench.run(work)
    parts = list(zip(*(shards for shards, _ in ranks), strict=True))
    tensors = [layout.unshard(list(shards), dim=1) for shards in parts[:2]]
    if dout is not None:
        tensors.append(torch.stack(list(parts[2])).sum(0))
    return tensors, [sent for _, sent in ranks]


def _move(small: Small, bench: Bench, source: Layout, target: Layout, whole: Tensor) -> tuple[int, list[list[Counted]]]:
    """Return how many numbers came to a wrong place, forward and backward, and what each rank sent."""

    def work(transport: Transport) -> tuple[int, list[Counted]]:
        x, back = (source.shard(each, rank=transport.rank, dim=1).to(bench.device) for each in (whole, -whole))
        due, dout = (target.shard(each, rank=transport.rank, dim=1).to(bench.device) for each in (whole, -whole))
        x.requires_grad_()
        row = whole.shape[0] * whole.shape[2] * whole.element_size()
        planned = [
            relayout_sent(a, b, rank=transport.rank, total=small.total, row_bytes=row)
            for a, b in ((source, target), (target, source))
        ]
        marks = [mark(transport)]
        out = relayout(x, source=source, target=target, total=small.total, transport=transport)
        marks.append(mark(transport))
        (dx,) = torch.autograd.grad(out, x, dout)
        marks.append(mark(transport))
        return int((out != due).sum()) + int((dx != back).sum()), counted(marks, planned)

    ranks = bench.run(work)
    return sum(wrong for wrong, _ in ranks), [sent for _, sent in ranks]
