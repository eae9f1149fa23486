"""Run a sparse layer on all ranks of a bench, put the shards together, and count what was sent; one rank beside it.

In float64 it is the layer as the decoder has it, from x to its output projection. In the configured dtype it is what
comes between q, k, v and out, of inputs that are rounded once: projections of shards are not those of the whole to the
last bit, and a selection can hang on that bit.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from longctx.kernels.block_sparse.op import resolve_kernel
from longctx.kernels.block_sparse.selection import Selection
from longctx.kernels.contract import Request
from longctx.mixers.place import Place
from longctx.mixers.sparse.base import Inputs, SparseMixerConfig
from longctx.model import SelfAttention
from longctx.parallel.transport import Traffic, Transport
from longctx.rope import apply_rope, rope_table
from longctx.stack import Stack, build_stack
from longctx.verification.attend import kernel_name, mark
from longctx.verification.bench import Bench
from longctx.verification.check_data import kernel_for
from longctx.verification.lively import enliven
from longctx.verification.small import Small
from longctx.verification.truth_sparse import starts_of
from longctx.verification.watch_sparse import Note, Watched
from longctx.verification.whole_sparse import WholeSparse

OUT, LOSS = "out", "loss"  # results, beside gradients: `d` and the name of an input, and names of parameters
_BETWEEN = ("x", "q", "k", "v", "plain_q", "plain_k")


@dataclass(frozen=True, kw_only=True)
class LayerProblem:
    """Whole tensors on the CPU, and the layer that they go through.

    Attributes:
        inputs: `x [B, T, dim]`, or all that stands between x and the mixer: `Inputs` but for sink logits.
        dout: the gradient of the output: of the layer `[B, T, dim]`, or of the mixer `[B, T, H, D]`.
    """

    module: SelfAttention
    inputs: dict[str, Tensor]
    dout: Tensor
    theta: float

    @property
    def whole_layer(self) -> bool:
        """Tell whether it is the layer, or its mixer alone."""
        return "q" not in self.inputs

    def parameters(self, module: nn.Module) -> dict[str, nn.Parameter]:
        """Return what learns of a copy of the module, by name; for the mixer alone its own, and sink logits."""
        return {
            name: parameter
            for name, parameter in module.named_parameters()
            if parameter.requires_grad and (self.whole_layer or name.startswith(("sparse.", "sink_logits")))
        }

    def forward(self, module: SelfAttention, inputs: dict[str, Tensor], place: Place) -> Tensor:
        """Return the output at a place."""
        if self.whole_layer:
            size, x = module.rope_dim, inputs["x"]
            rope = None if size is None else rope_table(place.positions, head_dim=size, theta=self.theta, dtype=x.dtype)
            return module(x, rope=rope, place=place)  # type: ignore[no-any-return]
        assert module.sparse is not None and place.sparse is not None
        return module.sparse(  # type: ignore[no-any-return]
            Inputs(**inputs, sink_logits=module.sink_logits), place=place.sparse
        )


@dataclass(frozen=True)
class LayerOutcome:
    """Whole tensors by name; what each rank's place was asked for; what it had sent before, after the forward pass and
    after the backward pass."""

    tensors: dict[str, Tensor]
    notes: list[list[Note]]
    marks: list[list[Traffic]]


def settings_of(small: Small, kind: str) -> SparseMixerConfig:
    """Return the small settings of a kind, with numbers for what depends on the model's heads."""
    settings = small.layers.mixers.sparse_kind(kind)
    return settings.of_model(heads=small.model.num_heads, kv_heads=small.model.num_kv_heads)


def sparse_kernel(small: Small, kind: str, *, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Return the name of the kernel that computes what is selected."""
    model = small.model
    request = Request(
        device_type=device.type,
        dtype=dtype,
        head_dim=head_dim,
        v_head_dim=head_dim,
        num_heads=model.num_heads,
        num_kv_heads=model.num_kv_heads,
        softcap=model.softcap is not None,
    )
    asked = settings_of(small, kind).requests(request)
    if not asked:  # all of it is dense
        return kernel_name(small, device=device, dtype=dtype, head_dim=head_dim)
    return resolve_kernel(_kernel_for(small, kind, dtype), *asked[0]).name


def make_layer(small: Small, kind: str, *, batch: int, seed: int) -> LayerProblem:
    """Return a layer in float64 with small heads, and random inputs, the same on every rank."""
    module = _module(small, kind, head_dim=small.model.head_size)
    x, dout = (_normal(batch, small.total, small.model.dim, seed=seed + n) for n in (0, 1))
    return LayerProblem(module=module, inputs={"x": x}, dout=dout, theta=small.model.rope_theta)


def make_mixer(small: Small, kind: str, *, batch: int, seed: int) -> LayerProblem:
    """Return the mixer of a layer in the configured dtype and head size, and inputs as a layer makes them."""
    head_dim = small.source.model.head_size
    module = _module(small, kind, head_dim=head_dim)
    x = _normal(batch, small.total, small.model.dim, seed=seed)
    with torch.no_grad():
        q, k, v = (
            project(x).unflatten(-1, (-1, head_dim)) for project in (module.q_proj, module.k_proj, module.v_proj)
        )
        q, k = module.q_norm(q), module.k_norm(k)
        rotated = [q, k]
        if module.rope_dim is not None:
            table = rope_table(
                torch.arange(small.total), head_dim=head_dim, theta=small.model.rope_theta, dtype=torch.float64
            )
            rotated = [apply_rope(each, table) for each in (q, k)]
    inputs = dict(zip(_BETWEEN, (x, *rotated, v, q, k), strict=True))
    dout = _normal(*q.shape, seed=seed + 1)
    problem = LayerProblem(module=module, inputs=inputs, dout=dout, theta=small.model.rope_theta)
    return rounded(problem, small.dtype)


def rounded(problem: LayerProblem, dtype: torch.dtype) -> LayerProblem:
    """Return a problem in another dtype, parameters included, as training has them."""
    inputs = {name: x.to(dtype) for name, x in problem.inputs.items()}
    return replace(problem, module=copy.deepcopy(problem.module).to(dtype), inputs=inputs, dout=problem.dout.to(dtype))


def run_layer(small: Small, bench: Bench, kind: str, problem: LayerProblem, *, backward: bool = True) -> LayerOutcome:
    """Return what the ranks compute together (collective on real ranks).

    The rows of the batch are packed as the samples are if there are as many, else all as the first sample.
    """
    index = small.layers.kinds.index(kind)
    rows = small.samples if len(problem.dout) == len(small.samples) else small.samples[:1]

    def work(transport: Transport) -> tuple[dict[str, Tensor], list[Note], list[Traffic]]:
        stack = stack_for(small, transport, dtype=problem.dout.dtype)
        layout = stack.layouts[index]
        plan = stack.plan([sample.cu_seqlens for sample in rows], total=small.total, device=bench.device)
        place = stack.places(plan)[index]
        assert place.sparse is not None
        watched = Watched(place.sparse, transport=transport)
        module = copy.deepcopy(problem.module).to(bench.device)
        inputs = {
            name: layout.shard(x, rank=transport.rank, dim=1).to(bench.device).requires_grad_(backward)
            for name, x in problem.inputs.items()
        }
        marks = [mark(transport)]
        with torch.set_grad_enabled(backward):
            out = problem.forward(module, inputs, replace(place, sparse=watched))
        marks.append(mark(transport))
        dout = layout.shard(problem.dout, rank=transport.rank, dim=1).to(bench.device)
        found = _results(problem, module, inputs, out, dout, plan.losses, backward=backward)
        marks.append(mark(transport))
        return found, watched.notes, marks

    ranks = bench.run(work)
    layout = small.layouts[index]
    tensors = {}
    for name in ranks[0][0]:
        shards = [found[name] for found, _, _ in ranks]
        token_by_token = name == OUT or name.removeprefix("d") in problem.inputs
        tensors[name] = layout.unshard(shards, dim=1) if token_by_token else torch.stack(shards).sum(0)
    return LayerOutcome(tensors, [notes for _, notes, _ in ranks], [marks for _, _, marks in ranks])


def run_whole(
    small: Small,
    problem: LayerProblem,
    *,
    given: Sequence[Selection] | None = None,
    backward: bool = True,
    device: torch.device | None = None,
) -> LayerOutcome:
    """Return the same of whole sequences on one rank, densely, in the problem's dtype.

    Args:
        given: selections to attend to, call by call, in place of those that are made.
        device: default the CPU.
    """
    device = device or torch.device("cpu")
    place, losses = whole_place(small, batch=len(problem.dout), device=device)
    assert place.sparse is not None
    watched = Watched(place.sparse, given=given)
    module = copy.deepcopy(problem.module).to(device)
    inputs = {name: x.detach().clone().to(device).requires_grad_(backward) for name, x in problem.inputs.items()}
    with torch.set_grad_enabled(backward):
        out = problem.forward(module, inputs, replace(place, sparse=watched))
    found = _results(problem, module, inputs, out, problem.dout.to(device), losses, backward=backward)
    return LayerOutcome({name: x.detach().cpu() for name, x in found.items()}, [watched.notes], [])


def whole_place(small: Small, *, batch: int, device: torch.device) -> tuple[Place, list[Tensor]]:
    """Return where a layer has whole sequences on one rank, and where its losses go."""
    rows = small.documents if batch == len(small.documents) else small.documents[:1]
    document_of = torch.stack([document_starts(small, row) for row in rows]).to(device)
    sparse = WholeSparse(document_of=document_of, softcap=small.model.softcap)
    return Place(positions=sparse.positions, sparse=sparse), sparse.losses


def document_starts(small: Small, documents: Tensor) -> Tensor:
    """Return the first position of what each token may see, int64 `[T]`, by the truth."""
    return starts_of(documents if small.attention.documents else torch.zeros_like(documents))


def stack_for(small: Small, transport: Transport, *, dtype: torch.dtype) -> Stack:
    """Return the layers that training would use, of one rank: in the configured dtype with the configured kernels and
    head size."""
    mixers, model = small.layers.mixers, small.model
    for kind in small.layers.sparse_kinds:
        changed = {kind: replace(mixers.sparse_kind(kind), kernel=_kernel_for(small, kind, dtype))}
        mixers = replace(mixers, **changed)  # type: ignore[arg-type]
    if dtype == small.dtype:
        model = replace(model, head_dim=small.source.model.head_size)
    return build_stack(
        replace(small.attention, kernel=kernel_for(small, dtype)),
        layers=replace(small.layers, mixers=mixers),
        model=model,
        total=small.total,
        dtype=dtype,
        transport=transport,
        per_machine=small.per_machine,
    )


def _kernel_for(small: Small, kind: str, dtype: torch.dtype) -> str:
    """Return the configured kernel by name; in another dtype than the configured one that has it."""
    source = small.source if dtype == small.dtype else small
    return source.layers.mixers.sparse_kind(kind).kernel


def _module(small: Small, kind: str, *, head_dim: int) -> SelfAttention:
    model = replace(small.model, head_dim=head_dim)
    module = SelfAttention(model, small.layers.mixers.sparse_kind(kind)).double()
    enliven(module, model)
    return module


def _results(
    problem: LayerProblem,
    module: SelfAttention,
    inputs: dict[str, Tensor],
    out: Tensor,
    dout: Tensor,
    losses: Sequence[Tensor],
    *,
    backward: bool,
) -> dict[str, Tensor]:
    """Return the output, the layer's own loss if it has one, and the gradients of both together."""
    found = {OUT: out}
    if losses:
        found[LOSS] = torch.stack(list(losses)).sum()
    if backward:
        parameters = problem.parameters(module)
        outputs, grads = [out], [dout]
        if losses and found[LOSS].requires_grad:
            outputs, grads = [*outputs, found[LOSS]], [*grads, torch.ones_like(found[LOSS])]
        wanted = [*inputs.values(), *parameters.values()]
        parts = torch.autograd.grad(outputs, wanted, grads, allow_unused=True, materialize_grads=True)
        names = [*(f"d{name}" for name in inputs), *parameters]
        found |= dict(zip(names, parts, strict=True))
    return {name: x.detach() for name, x in found.items()}


def _normal(*size: int, seed: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
