"""Checks of the whole decoder: loss and every parameter's gradient against one rank, leaks through all layers, and on
real ranks the engine's own step.
"""

import copy
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from longctx.batch import shard_samples
from longctx.kernels.softmax.reference import dense_attention
from longctx.loss import token_loss_sum
from longctx.mixers.pattern import LINEAR_KINDS, SPARSE_KINDS
from longctx.mixers.place import Place
from longctx.model import Decoder
from longctx.parallel.transport import Transport
from longctx.verification import truth, truth_sparse
from longctx.verification.attend import kernel_name
from longctx.verification.bench import Bench
from longctx.verification.check_attention import EXACT
from longctx.verification.check_data import stack_of, where
from longctx.verification.check_sparse_leaks import ROUNDING
from longctx.verification.lively import enliven
from longctx.verification.recur import kernel_of, shape_of
from longctx.verification.report import Finding, at_most
from longctx.verification.small import Small
from longctx.verification.sparse_layer import document_starts, settings_of, sparse_kernel
from longctx.verification.whole_sparse import WholeSparse

_PROBES = 12


def check_model(small: Small, bench: Bench) -> list[Finding]:
    """Compare the loss and every gradient in float64 with those of one rank that holds whole sequences."""
    model = lively_model(small)
    labels = sum(int((each >= 0).sum()) for each in small.labels)

    def work(transport: Transport) -> tuple[Tensor, Tensor, list[Tensor]]:
        mine = copy.deepcopy(model).to(bench.device)
        stack = stack_of(small, transport)
        batch = shard_samples(small.samples, stack=stack, device=bench.device)
        loss = token_loss_sum(mine(batch.tokens, places=stack.places(batch.plan)), batch.labels)
        return _minimised(mine, loss, batch.plan.losses, labels)

    ranks = bench.run(work)
    whole = dense_loss_and_grads(small, model)
    got, added = sum(float(rank[0]) for rank in ranks), sum(float(rank[1]) for rank in ranks)
    kernel = _kernels(small, bench.device)
    worst, worst_name = 0.0, "no parameter"
    for index, (name, parameter) in enumerate(trained(model).items()):
        ours, theirs = torch.stack([rank[2][index] for rank in ranks]).sum(0), whole.grads[index]
        scale = max(float(theirs.abs().max()), float(parameter.detach().abs().max()) * 1e-6)
        error = float((ours - theirs).abs().max()) / scale
        if not error <= worst:
            worst, worst_name = math.inf if math.isnan(error) else error, name
    of_layers = at_most(
        "decoder: losses of layers",
        abs(added - whole.added) / abs(whole.added or 1.0),
        EXACT,
        kernel=kernel,
        why=f"{added!r} instead of {whole.added!r}: what layers want minimised is a sum over each rank's own tokens",
    )
    return [
        at_most(
            "decoder: loss vs one rank",
            abs(got - whole.loss) / abs(whole.loss),
            EXACT,
            kernel=kernel,
            why=f"{got!r} instead of {whole.loss!r}: wrong labels, positions, mask, or a mean of means over the ranks",
        ),
        *([of_layers] if whole.added or added else []),
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


class Minimised(NamedTuple):
    """Means over all true labels.

    Attributes:
        loss: of the tokens; added: what layers want minimised besides.
        grads: of both together, of what is trained.
    """

    loss: float
    added: float
    grads: list[Tensor]


def trained(model: Decoder) -> dict[str, nn.Parameter]:
    """Return the parameters that are not frozen, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def check_model_leaks(small: Small, bench: Bench) -> Finding:
    """Change one token id, and see that exactly those logits move that can see it through all layers.

    Of layers that select by data it is known only who cannot see it.
    """
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

        before, after = logits(tokens.repeat(count, 1)), logits(changed)
        # Which queries are computed together depends on what is selected, and so does the order of sums.
        rounding = ROUNDING * float(before.abs().max()) if small.layers.sparse else 0.0
        return ~((after - before).abs() <= rounding).all(dim=-1), plan.positions[stack.last]

    ranks = bench.run(work)
    moved = torch.zeros(count, small.total, dtype=torch.bool)
    for shard, positions in ranks:
        moved[:, positions] = shard
    sees = {kind: _reach(small, kind) for kind in small.layers.used}
    most, least = torch.eye(small.total, dtype=torch.bool), torch.eye(small.total, dtype=torch.bool)
    for kind in small.layers.kinds:
        most |= (sees[kind][0].float() @ most.float()) > 0
        least |= (sees[kind][1].float() @ least.float()) > 0
    leaks, blind = moved & ~most[:, probed].T, least[:, probed].T & ~moved
    why = ""
    if (leaks | blind).any():
        row, place = (leaks if leaks.any() else blind).nonzero()[0].tolist()
        does = "moves" if leaks.any() else "does not move"
        why = f"changing the token at {where(small, int(probed[row]))} {does} the logits at {where(small, place)}"
    kernel = _kernels(small, bench.device)
    return Finding(
        name="decoder: leak probes",
        measured=f"{int(leaks.sum()):,} leaks, {int(blind.sum()):,} blind",
        bound=f"0 of {count} tokens" if _causal(small) else "0; documents only",
        passed=not why,
        kernel=kernel,
        why=why,
    )


def lively_model(small: Small) -> Decoder:
    """Return a float64 decoder whose every parameter matters."""
    model = Decoder(small.model, small.layers).double()
    enliven(model, small.model)
    return model


def dense_loss_and_grads(small: Small, model: Decoder) -> Minimised:
    """Return the mean loss over all true labels, and the gradients, from whole sequences, dense attention and the
    recurrence."""
    positions, losses = torch.arange(small.total), list[Tensor]()
    added: list[Tensor] = []
    for row, (tokens, labels) in enumerate(zip(small.tokens, small.labels, strict=True)):
        by_kind = {kind: _whole(small, kind, row, positions, added) for kind in small.layers.used}
        logits = model(tokens[None], places=[by_kind[kind] for kind in small.layers.kinds])
        losses.append(token_loss_sum(logits, labels[None]))
    labels_that_count = sum(int((each >= 0).sum()) for each in small.labels)
    loss, of_layers, grads = _minimised(model, torch.stack(losses).sum(), added, labels_that_count)
    return Minimised(float(loss), float(of_layers), grads)


def _minimised(
    model: Decoder, loss: Tensor, added: Sequence[Tensor], labels: int
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return the loss of tokens and what layers add to it, over the labels, and the gradients of both together."""
    loss, of_layers = loss / max(labels, 1), sum(added, start=torch.zeros_like(loss)) / max(labels, 1)
    grads = torch.autograd.grad(
        loss + of_layers, list(trained(model).values()), allow_unused=True, materialize_grads=True
    )
    return loss.detach(), of_layers.detach(), list(grads)


def _reach(small: Small, kind: str) -> tuple[Tensor, Tensor]:
    """Return who at most, and who at least, is moved by whom in a layer of this kind: bool `[T, T]`."""
    if kind in SPARSE_KINDS:
        documents = document_starts(small, small.documents[0])
        heads, kv_heads = small.model.num_heads, small.model.num_kv_heads
        return truth_sparse.reach(settings_of(small, kind), documents, heads=heads, kv_heads=kv_heads)
    seen = _seen(small, kind)[0].any(dim=0)
    return seen, seen


def _causal(small: Small) -> bool:
    return all(truth_sparse.causal(settings_of(small, kind)) for kind in small.layers.sparse_kinds)


def _seen(small: Small, kind: str) -> list[Tensor]:
    """Return who sees whom in a layer of this kind by the truth, for each sample: bool `[1 or H, T, T]`."""
    if kind in LINEAR_KINDS:
        return [truth.before(small.attention, documents) for documents in small.documents]
    return small.of_kind(kind).allowed


def _whole(small: Small, kind: str, row: int, positions: Tensor, losses: list[Tensor]) -> Place:
    """Return where a layer of this kind has a whole sequence, that of a sample; `losses` is where its own go."""
    if kind in SPARSE_KINDS:
        starts = document_starts(small, small.documents[row])[None]
        sparse = WholeSparse(document_of=starts, softcap=small.model.softcap, losses=losses)
        return Place(positions=positions, sparse=sparse)
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
    for kind in small.layers.sparse_kinds:
        found.add(sparse_kernel(small, kind, device=device, dtype=torch.float64, head_dim=small.model.head_size))
    return found.pop() if len(found) == 1 else "as above"
