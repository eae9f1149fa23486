"""Problems of linear attention, whole and shared between ranks."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from longctx.kernels.linear.op import linear_attention
from longctx.linear_attention import ContextParallelLinearAttention
from longctx.parallel.layout import Layout
from longctx.parallel.state_passing import resolve_passing
from longctx.parallel.transport import Transport

GATES = ("none", "fixed", "scalar", "diagonal")
RULES = ("sum", "delta")
PASSINGS = ("ring", "all_gather", "log_depth", "pipelined")
LAYOUTS = {
    "contiguous": ("contiguous", 1),
    "zigzag": ("zigzag", 1),
    "stripes5": ("striped", 5),
    "striped": ("striped", 1),
}


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Whole sequences, cotangents included; `bounds` is one cu_seqlens or None."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor | None
    beta: Tensor | None
    dout: Tensor
    dfinal: Tensor
    initial: Tensor | None
    bounds: tuple[int, ...] | None

    @property
    def inputs(self) -> dict[str, Tensor]:
        """Return what has a gradient."""
        tensors = {"q": self.q, "k": self.k, "v": self.v, "g": self.g, "beta": self.beta, "initial": self.initial}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def make_problem(
    total: int,
    *,
    gate: str,
    rule: str,
    bounds: Sequence[int] | None,
    initial: bool,
    batch: int = 2,
    heads: int = 2,
    key_dim: int = 4,
    value_dim: int = 3,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Problem:
    """Return random sequences; keys have length one under the delta rule."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    k = draw(batch, total, heads, key_dim)
    shapes = {"fixed": (heads,), "scalar": (batch, total, heads), "diagonal": (batch, total, heads, key_dim)}
    return Problem(
        q=draw(batch, total, heads, key_dim),
        k=torch.nn.functional.normalize(k, dim=-1) if rule == "delta" else k,
        v=draw(batch, total, heads, value_dim),
        g=None if gate == "none" else -draw(*shapes[gate]).square(),
        beta=torch.sigmoid(draw(batch, total, heads)) if rule == "delta" else None,
        dout=draw(batch, total, heads, value_dim),
        dfinal=draw(batch, heads, key_dim, value_dim),
        initial=draw(batch, heads, key_dim, value_dim) if initial else None,
        bounds=None if bounds is None else tuple(bounds),
    )


def whole(problem: Problem, *, kernel: str) -> dict[str, Tensor]:
    """Return out, the final state and every gradient of one device."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in problem.inputs.items()}
    out, final = linear_attention(
        leaves["q"],
        leaves["k"],
        leaves["v"],
        g=leaves.get("g"),
        beta=leaves.get("beta"),
        initial_state=leaves.get("initial"),
        cu_seqlens=problem.bounds,
        kernel=kernel,
    )
    ((out * problem.dout).sum() + (final * problem.dfinal).sum()).backward()
    return {"out": out.detach(), "final": final.detach(), **{f"d{n}": x.grad for n, x in leaves.items()}}


def sharded(
    transport: Transport, layout: Layout, problem: Problem, *, passing: str, kernel: str, chunk_size: int | None = None
) -> dict[str, Tensor | None]:
    """Return one rank's part of the same."""
    attention = ContextParallelLinearAttention(
        layout=layout,
        passing=resolve_passing(passing, splits=2 if passing == "pipelined" else None),
        transport=transport,
        kernel=kernel,
    )
    total = problem.q.shape[1]

    def part(tensor: Tensor | None) -> Tensor | None:
        per_token = tensor is not None and tensor.dim() >= 3 and tensor.shape[1] == total
        return layout.shard(tensor, rank=transport.rank, dim=1) if per_token else tensor

    leaves = {name: part(tensor).detach().clone().requires_grad_() for name, tensor in problem.inputs.items()}
    bounds = None if problem.bounds is None else [problem.bounds]
    plan = attention.plan(bounds, total=total, device=problem.q.device)
    out, final = attention.with_state(
        leaves["q"],
        leaves["k"],
        leaves["v"],
        g=leaves.get("g"),
        beta=leaves.get("beta"),
        initial_state=leaves.get("initial"),
        chunk_size=chunk_size,
        plan=plan,
    )
    loss = (out * part(problem.dout)).sum()
    if final is not None:
        loss = loss + (final * problem.dfinal).sum()
    loss.backward()
    grads = {f"d{name}": tensor.grad for name, tensor in leaves.items()}
    return {"out": out.detach(), "final": None if final is None else final.detach(), **grads}


def assert_parts(
    layout: Layout, ranks: Sequence[dict[str, Tensor | None]], want: dict[str, Tensor], bar: float
) -> None:
    """Compare every rank's part by itself; of what all ranks share, the sum of their shares."""
    for name, expected in want.items():
        parts = [rank[name] for rank in ranks]
        if name == "final":
            found = [part for part in parts if part is not None]
            assert len(found) == 1, "one rank has the final state"
            _close(name, found[0], expected, bar)
        elif expected.dim() >= 3 and expected.shape[1] == want["out"].shape[1]:
            for rank, part in enumerate(parts):
                assert part is not None, f"{name} of rank {rank}"
                _close(f"{name} of rank {rank}", part, layout.shard(expected, rank=rank, dim=1), bar)
        else:
            _close(name, sum(part for part in parts if part is not None), expected, bar)


def _close(name: str, found: Tensor, expected: Tensor, bar: float) -> None:
    assert found.shape == expected.shape, (name, found.shape, expected.shape)
    error = (found.double() - expected.double()).abs().max().item()
    assert error <= bar * max(1.0, expected.abs().max().item()), f"{name}: {error:.2e}"


def in_other_dtype(problem: Problem, dtype: torch.dtype) -> Problem:
    """Return the same numbers in another dtype."""
    names = ("q", "k", "v", "g", "beta", "dout", "dfinal", "initial")
    return replace(
        problem, **{n: None if getattr(problem, n) is None else getattr(problem, n).to(dtype) for n in names}
    )
