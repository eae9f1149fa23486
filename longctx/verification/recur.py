"""Run linear attention on all ranks of a bench, put the shards together, and count what was sent; the recurrence beside
it, token by token on whole tensors."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from longctx.kernels.linear.contract import LinearRequest
from longctx.kernels.linear.op import resolve_kernel
from longctx.kernels.merge import accumulator_dtype
from longctx.mixers.shape import LinearShape, linear_shape
from longctx.mixers.transition import fixed_decay
from longctx.parallel.chain import chain
from longctx.parallel.schedule import Sent
from longctx.parallel.transport import Transport
from longctx.verification import truth
from longctx.verification.attend import Counted, Outcome, counted, mark
from longctx.verification.bench import Bench
from longctx.verification.check_data import stack_of
from longctx.verification.small import Small

RESULTS = ("out", "state")  # and the gradients of `Recurrence.inputs`, with a d before


@dataclass(frozen=True, kw_only=True)
class Recurrence:
    """Whole tensors on the CPU.

    Attributes:
        inputs: `q, k [B, T, H, K]`, `v [B, T, H, V]`, `g` and `beta` where the kind has them, `state [B, H, K, V]`
            before the sequence.
        dout, dstate: gradients of out `[B, T, H, V]` and of the last state `[B, H, K, V]`.
    """

    inputs: dict[str, Tensor]
    dout: Tensor
    dstate: Tensor

    def to(self, dtype: torch.dtype) -> "Recurrence":
        """Return it in another dtype; gates and states stay float32 or better."""
        wide = accumulator_dtype(dtype)
        inputs = {name: x.to(wide if name in ("g", "beta", "state") else dtype) for name, x in self.inputs.items()}
        return Recurrence(inputs=inputs, dout=self.dout.to(dtype), dstate=self.dstate.to(wide))


def shape_of(small: Small, kind: str, *, configured: bool) -> LinearShape:
    """Return the shape of a linear kind: as configured, or with the small heads of the checks in float64."""
    layers, model = (small.source.layers, small.source.model) if configured else (small.layers, small.model)
    return linear_shape(layers, kind, heads=model.num_heads, head_dim=model.head_size)


def request_of(shape: LinearShape, *, device: torch.device, dtype: torch.dtype) -> LinearRequest:
    """Return what the kernel is asked for: the kind's recurrence, not that of a normaliser beside it."""
    return shape.requests(device_type=device.type, dtype=dtype)[0]


def kernel_of(shape: LinearShape, *, device: torch.device, dtype: torch.dtype) -> str:
    """Return the name of the kernel that computes a kind."""
    return resolve_kernel(shape.kernel, request_of(shape, device=device, dtype=dtype)).name


def make_recurrence(
    small: Small, kind: str, shape: LinearShape, *, batch: int, seed: int, lasting: bool = False
) -> Recurrence:
    """Return random float64 tensors, the same on every rank.

    Args:
        lasting: gates so weak that whatever a token writes is read, in float64, to the end of its document; without,
            there are gates of all strengths, among them ones that forget everything.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    heads, (keys, values) = shape.heads, shape.recurrences[0]
    tokens = (batch, small.total, heads)
    inputs = {"q": normal(*tokens, keys), "k": normal(*tokens, keys), "v": normal(*tokens, values)}
    if shape.delta:
        inputs["k"] = torch.nn.functional.normalize(inputs["k"], dim=-1)
        inputs["beta"] = normal(*tokens).sigmoid() * (0.2 if lasting else 1.0)
    if shape.gate == "fixed":
        layer = small.layers.kinds.index(kind)
        decay = small.layers.mixers.linear_kind(kind).decay
        inputs["g"] = fixed_decay(
            decay, heads, layer, len(small.layers.kinds), torch.float64, torch.device("cpu")
        ).clone()
    elif shape.gate != "none":
        size = (*tokens, keys) if shape.gate == "diagonal" else tokens
        draw = normal(*size)
        inputs["g"] = torch.where(draw > 2, -20.0, torch.where(draw < -2, 0.0, -torch.nn.functional.softplus(draw - 2)))
    if lasting and "g" in inputs:
        inputs["g"] = inputs["g"].clamp(min=-1.0) * 0.01
    inputs["state"] = normal(batch, heads, keys, values)
    return Recurrence(inputs=inputs, dout=normal(*tokens, values), dstate=normal(batch, heads, keys, values))


def recur(
    small: Small, bench: Bench, kind: str, shape: LinearShape, problem: Recurrence, *, backward: bool = True
) -> Outcome:
    """Return what the ranks compute together (collective on real ranks): `RESULTS`, and gradients by `d` and a name.

    The rows of the batch are packed as the samples are if there are as many, else all as the first sample.
    """
    layout, names = small.states, list(problem.inputs)
    whole = shape.gate == "fixed"

    def sharded(name: str) -> bool:
        return name != "state" and not (name == "g" and whole)

    def work(transport: Transport) -> tuple[dict[str, Tensor | None], list[Counted]]:
        linear = replace(stack_of(small, transport).linear[kind], kernel=shape.kernel)

        def own(name: str, x: Tensor) -> Tensor:
            return (layout.shard(x, rank=transport.rank, dim=1) if sharded(name) else x.clone()).to(bench.device)

        leaves = {name: own(name, x).requires_grad_(backward) for name, x in problem.inputs.items()}
        rows = small.samples if problem.dout.shape[0] == len(small.samples) else small.samples[:1]
        bounds = [sample.cu_seqlens for sample in rows] if small.attention.documents else None
        plan = linear.plan(bounds, total=small.total, device=bench.device)
        planned = _planned(small, shape, problem, transport.rank)
        marks = [mark(transport)]
        out, state = linear.with_state(
            leaves["q"],
            leaves["k"],
            leaves["v"],
            plan=plan,
            g=leaves.get("g"),
            beta=leaves.get("beta"),
            chunk_size=shape.chunk_size,
            initial_state=leaves["state"],
        )
        marks.append(mark(transport))
        found: dict[str, Tensor | None] = {"out": out, "state": state}
        if backward:
            outputs, grads = [out], [own("out", problem.dout)]
            if state is not None:
                outputs, grads = [*outputs, state], [*grads, own("state", problem.dstate)]
            parts = torch.autograd.grad(outputs, list(leaves.values()), grads, materialize_grads=True)
            found |= {f"d{name}": part for name, part in zip(names, parts, strict=True)}
        marks.append(mark(transport))
        return found, counted(marks, planned)

    ranks = bench.run(work)
    tensors: dict[str, Tensor] = {}
    for name in ranks[0][0]:
        shards = [each for found, _ in ranks if (each := found[name]) is not None]
        if name == "state":
            (tensors[name],) = shards  # of the rank that has the last token
        elif sharded(name.removeprefix("d") if name != "dout" else name):
            tensors[name] = layout.unshard(shards, dim=1)
        else:
            tensors[name] = torch.stack(shards).sum(0)  # every rank has its share
    return Outcome(tensors, [sent for _, sent in ranks])


def recurred(small: Small, problem: Recurrence, *, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the same by the recurrence on whole tensors, row by row, all in `dtype`, on the CPU."""
    leaves = {name: x.to(dtype, copy=True).requires_grad_() for name, x in problem.inputs.items()}
    rows = []
    for row, documents in enumerate(small.documents):
        each = {name: x if x.dim() == 1 else x[row : row + 1] for name, x in leaves.items()}
        rows.append(
            truth.recurrence(
                each["q"],
                each["k"],
                each["v"],
                g=each.get("g"),
                beta=each.get("beta"),
                scale=None,
                documents=documents if small.attention.documents else torch.zeros_like(documents),
                initial=each["state"],
            )
        )
    out, state = (torch.cat(parts) for parts in zip(*rows, strict=True))
    grads = torch.autograd.grad(
        [out, state],
        list(leaves.values()),
        [problem.dout.to(dtype), problem.dstate.to(dtype)],
        materialize_grads=True,
    )
    return {"out": out.detach(), "state": state.detach()} | {
        f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)
    }


def _planned(small: Small, shape: LinearShape, problem: Recurrence, rank: int) -> list[Sent]:
    """Return what a rank sends forward and backward."""
    links = chain(small.states, small.total)
    if len(links) == 1:
        return [Sent(0, {})] * 2
    one = replace(shape, recurrences=shape.recurrences[:1])
    wide = accumulator_dtype(problem.dout.dtype).itemsize * problem.dout.shape[0]
    passing = small.passing
    sizes = {"transition_bytes": one.transition_size * wide, "state_bytes": one.state_size * wide}
    return [passing.sent(way, rank, **sizes) for way in (links, links.reversed())]
