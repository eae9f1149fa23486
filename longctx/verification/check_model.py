"""Checks of the whole decoder: loss and every parameter's gradient against one rank, leaks through all layers, and on
real ranks the engine's own step.
"""

import copy

import torch
from torch import Tensor

from longctx.batch import shard_samples
from longctx.kernels.softmax.reference import dense_attention
from longctx.loss import token_loss_sum
from longctx.mixers.pattern import LINEAR_KINDS
from longctx.mixers.place import Place
from longctx.model import Decoder, initial_weight
from longctx.parallel.transport import Transport
from longctx.verification import truth
from longctx.verification.attend import kernel_name
from longctx.verification.bench import Bench
from longctx.verification.check_attention import EXACT
from longctx.verification.check_data import stack_of, where
from longctx.verification.recur import kernel_of, shape_of
from longctx.verification.report import Finding, at_most
from longctx.verification.small import Small

_PROBES = 12


def check_model(small: Small, bench: Bench) -> list[Finding]:
    """Compare the loss and every gradient in float64 with those of one rank that holds whole sequences."""
    model = lively_model(small)
    labels = sum(int((each >= 0).sum()) for each in small.labels)

    def work(transport: Transport) -> tuple[Tensor, list[Tensor]]:
        mine = copy.deepcopy(model).to(bench.device)
        stack = stack_of(small, transport)
        batch = shard_samples(small.samples, stack=stack, device=bench.device)
        loss = token_loss_sum(mine(batch.tokens, places=stack.places(batch.plan)), batch.labels) / max(labels, 1)
        return loss.detach(), list(torch.autograd.grad(loss, list(mine.parameters())))

    ranks = bench.run(work)
    loss, grads = dense_loss_and_grads(small, model)
    got = sum(float(rank[0]) for rank in ranks)
    kernel = _kernels(small, bench.device)
    worst, worst_name = 0.0, "no parameter"
    for index, (name, parameter) in enumerate(model.named_parameters()):
        ours = torch.stack([rank[1][index] for rank in ranks]).sum(0)
        scale = max(float(grads[index].abs().max()), float(parameter.detach().abs().max()) * 1e-6)
        error = float((ours - grads[index]).abs().max()) / scale
        if not error <= worst:
            worst, worst_name = error, name
    return [
        at_most(
            "decoder: loss vs one rank",
            abs(got - loss) / abs(loss),
            EXACT,
            kernel=kernel,
            why=f"{got!r} instead of {loss!r}: wrong labels, positions, mask, or a mean of means over the ranks",
        ),
        at_most(
            "decoder: worst gradient",
            worst,
            EXACT,
            kernel=kernel,
            why=(
                f"the gradient of {worst_name} is off by {worst:.1e} of its largest entry. Only the attention mixes "
                "tokens: if its own checks pass, look at positions, labels, and what is summed over the ranks"
            ),
        ),
    ]


def check_model_leaks(small: Small, bench: Bench) -> Finding:
    """Change one token id, and see that exactly those logits move that can see it through all layers."""
    model = lively_model(small)
    tokens = small.tokens[0]
    count = min(_PROBES, small.total)
    probed = torch.linspace(0, small.total - 1, count).round().long()
    changed = tokens.repeat(count, 1)
    changed[torch.arange(count), probed] = (tokens[probed] + 1) % len(small.document_of_token)

    @torch.no_grad()
    def work(transport: Transport) -> tuple[Tensor, Tensor]:
        stack = stack_of(small, transport)
        mine = copy.deepcopy(model).to(bench.device)
        plan = stack.plan([small.samples[0].cu_seqlens], total=small.total, device=bench.device)

        def logits(whole: Tensor) -> Tensor:
            shard = stack.first.shard(whole, rank=transport.rank, dim=1).to(bench.device)
            return mine(shard, places=stack.places(plan))

        moved = (logits(changed) != logits(tokens.repeat(count, 1))).any(dim=-1)
        return moved, plan.positions[stack.last]

    ranks = bench.run(work)
    moved = torch.zeros(count, small.total, dtype=torch.bool)
    for shard, positions in ranks:
        moved[:, positions] = shard
    sees = {kind: _seen(small, kind)[0].any(dim=0) for kind in small.layers.used}
    reach = torch.eye(small.total, dtype=torch.bool)
    for kind in small.layers.kinds:
        reach |= (sees[kind].float() @ reach.float()) > 0
    expected = reach[:, probed].T
    leaks, blind = moved & ~expected, expected & ~moved
    why = ""
    if (leaks | blind).any():
        row, place = (leaks if leaks.any() else blind).nonzero()[0].tolist()
        does = "moves" if leaks.any() else "does not move"
        why = f"changing the token at {where(small, int(probed[row]))} {does} the logits at {where(small, place)}"
    kernel = _kernels(small, bench.device)
    return Finding(
        name="decoder: leak probes",
        measured=f"{int(leaks.sum()):,} leaks, {int(blind.sum()):,} blind",
        bound=f"0 of {count} tokens",
        passed=not why,
        kernel=kernel,
        why=why,
    )


def lively_model(small: Small) -> Decoder:
    """Return a float64 decoder whose every parameter matters: scores of order 1, norms and sinks unlike each other,
    and decays so slow that no token is forgotten."""
    model = Decoder(small.model, small.layers).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = initial_weight(name, parameter.shape, config=small.model, seed=5).double()
            generator = torch.Generator().manual_seed(sum(map(ord, name)))
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if name.endswith("A_log"):
                parameter.copy_(0.3 * noise - 6.0)
            elif parameter.dim() == 1:
                parameter.copy_(value + 0.3 * noise)
            else:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
    return model


def dense_loss_and_grads(small: Small, model: Decoder) -> tuple[float, list[Tensor]]:
    """Return the mean loss over all true labels, and its gradients, from whole sequences, dense attention and the
    recurrence."""
    positions, losses = torch.arange(small.total), []
    for row, (tokens, labels) in enumerate(zip(small.tokens, small.labels, strict=True)):
        by_kind = {kind: _whole(small, kind, row, positions) for kind in small.layers.used}
        logits = model(tokens[None], places=[by_kind[kind] for kind in small.layers.kinds])
        losses.append(token_loss_sum(logits, labels[None]))
    labels_that_count = sum(int((each >= 0).sum()) for each in small.labels)
    loss = torch.stack(losses).sum() / max(labels_that_count, 1)
    return float(loss.detach()), list(torch.autograd.grad(loss, list(model.parameters())))


def _seen(small: Small, kind: str) -> list[Tensor]:
    """Return who sees whom in a layer of this kind by the truth, for each sample: bool `[1 or H, T, T]`."""
    if kind in LINEAR_KINDS:
        return [truth.before(small.attention, documents) for documents in small.documents]
    return small.of_kind(kind).allowed


def _whole(small: Small, kind: str, row: int, positions: Tensor) -> Place:
    """Return where a layer of this kind has a whole sequence, that of a sample."""
    documents = small.documents[row] if small.attention.documents else torch.zeros_like(positions)
    seen = _seen(small, kind)[row].expand(small.model.num_heads, -1, -1)

    def attend(q: Tensor, k: Tensor, v: Tensor, *, sink_logits: Tensor | None) -> Tensor:
        return dense_attention(q, k, v, allowed=seen, softcap=small.model.softcap, sink_logits=sink_logits)[0]

    def recur(q: Tensor, k: Tensor, v: Tensor, *, g: Tensor | None, beta: Tensor | None, scale: float | None) -> Tensor:
        return truth.recurrence(q, k, v, g=g, beta=beta, scale=scale, documents=documents)[0]

    def convolve(x: Tensor, weight: Tensor) -> Tensor:
        return truth.convolution(x, weight, documents)

    return Place(positions=positions, attend=attend, recur=recur, convolve=convolve)


def _kernels(small: Small, device: torch.device) -> str:
    """Return who computes the layers, if it is one kernel, or that it is several."""
    found = set()
    if small.layers.softmax:
        found.add(kernel_name(small, device=device, dtype=torch.float64, head_dim=small.model.head_size))
    for kind in small.layers.linear_kinds:
        found.add(kernel_of(shape_of(small, kind, configured=False), device=device, dtype=torch.float64))
    return found.pop() if len(found) == 1 else "as above"
