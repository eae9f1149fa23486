"""Kernel, cuts and state passing together on many ranks, against whole packed sequences on one: every gradient."""

from dataclasses import dataclass
from functools import lru_cache

import pytest
import torch
from torch import Tensor

from longctx.kernels.linear.contract import whole
from longctx.kernels.linear.reference import Reference
from longctx.parallel.chain import chain
from longctx.parallel.cuts import cuts
from longctx.parallel.layout import Layout
from longctx.parallel.loopback import run_ranks
from longctx.parallel.state_passing import PASSINGS, StatePassing, pass_states, resolve_passing
from longctx.parallel.transport import Transport

BATCH, HEADS, KEYS, VALUES = 2, 2, 3, 4
SCALE = KEYS**-0.5
KINDS = ("none", "fixed", "scalar", "diagonal", "delta", "gated_delta", "diagonal_delta")
LAYOUTS = (
    ("contiguous", 1),
    ("zigzag", 1),
    ("striped", 1),
    ("striped", 2),
)


@dataclass
class Problem:
    """Tensors by name, of whole sequences or of a rank's tokens: `q, k, v, dout`, and `g`, `beta` where there are."""

    tensors: dict[str, Tensor]

    @property
    def inputs(self) -> dict[str, Tensor]:
        return {name: x for name, x in self.tensors.items() if name != "dout"}

    def shard(self, layout: Layout, rank: int) -> "Problem":
        return Problem(
            {name: x.clone() if x.dim() == 1 else layout.shard(x, rank=rank, dim=1) for name, x in self.tensors.items()}
        )

    def row(self, row: int) -> "Problem":
        return Problem({name: x.clone() if x.dim() == 1 else x[row : row + 1] for name, x in self.tensors.items()})


def bounds_of(total: int) -> list[tuple[int, ...]]:
    """Return two rows of documents: of one token, of a few, and longer than a shard; and two long ones."""
    inner = {1, 2, total // 4, total // 4 + 1, total - 1}
    return [(0, *sorted(inner & set(range(1, total))), total), (0, total // 3 + 1, total)]


@lru_cache
def problem(kind: str, total: int) -> Problem:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    tokens = (BATCH, total, HEADS)
    tensors = {"q": randn(*tokens, KEYS), "k": randn(*tokens, KEYS), "v": randn(*tokens, VALUES)}
    tensors["dout"] = randn(*tokens, VALUES)
    tensors["k"] /= tensors["k"].norm(dim=-1, keepdim=True)
    gates = {"fixed": (HEADS,), "scalar": tokens, "gated_delta": tokens}
    gates.update(diagonal=(*tokens, KEYS), diagonal_delta=(*tokens, KEYS))
    if kind in gates:
        tensors["g"] = -randn(*gates[kind]).exp() / 4
    if "delta" in kind:
        tensors["beta"] = randn(*tokens).sigmoid() * 2
    return Problem(tensors)


def run(part: Problem, cut, states_of) -> tuple[Tensor, dict[str, Tensor]]:
    """Return out and the gradient of each input; `states_of(work)` are the states that enter the segments."""
    inputs = {name: x.detach().requires_grad_() for name, x in part.inputs.items()}
    work = Reference().begin(
        inputs["q"],
        inputs["k"],
        inputs["v"],
        g=inputs.get("g"),
        beta=inputs.get("beta"),
        scale=SCALE,
        cuts=cut,
        chunk_size=None,
    )
    out, _ = work.finish(states_of(work))
    grads = torch.autograd.grad(out, list(inputs.values()), part.tensors["dout"])
    return out.detach(), dict(zip(inputs, grads, strict=True))


@lru_cache
def expected(kind: str, total: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Run each row as a whole."""
    rows = [
        run(problem(kind, total).row(row), whole(total, bounds), lambda _: None)
        for row, bounds in enumerate(bounds_of(total))
    ]
    grads = {
        name: sum(row[1][name] for row in rows) if x.dim() == 1 else torch.cat([row[1][name] for row in rows])
        for name, x in rows[0][1].items()
    }
    return torch.cat([row[0] for row in rows]), grads


def on_rank(
    transport: Transport, layout: Layout, kind: str, total: int, passing: StatePassing
) -> tuple[Tensor, dict[str, Tensor]]:
    cut = cuts(layout, rank=transport.rank, total=total, bounds=bounds_of(total), device=torch.device("cpu"))
    links = chain(layout, total)
    return run(
        problem(kind, total).shard(layout, transport.rank),
        cut,
        lambda work: pass_states(work.summary(), passing=passing, chain=links, transport=transport),
    )


def check(layout: Layout, kind: str, passing: StatePassing) -> None:
    total = layout.cp * (5 if layout.cp < 8 else 3)
    out, grads = expected(kind, total)
    ranks = run_ranks(layout.cp, lambda transport: on_rank(transport, layout, kind, total, passing))
    for rank, (ours, ours_grads) in enumerate(ranks):
        assert (ours - layout.shard(out, rank=rank, dim=1)).abs().max() < 1e-10
        for name, ref in grads.items():
            if ref.dim() > 1:
                error = (ours_grads[name] - layout.shard(ref, rank=rank, dim=1)).abs().max()
                assert error < 1e-10, f"d{name} of rank {rank}"
    if kind == "fixed":  # a parameter, of which every rank has its share
        assert (sum(each["g"] for _, each in ranks) - grads["g"]).abs().max() < 1e-10


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cp", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("layout", range(len(LAYOUTS)))
def test_equal_to_whole_sequences(layout, cp, kind):
    name, width = LAYOUTS[layout]
    method = PASSINGS[(layout + cp + KINDS.index(kind)) % len(PASSINGS)]
    check(Layout(name, cp, width=width), kind, resolve_passing(method, splits=2 if method == "pipelined" else None))


@pytest.mark.parametrize("method", PASSINGS)
@pytest.mark.parametrize("kind", ["fixed", "gated_delta"])
def test_every_method(kind, method):
    check(Layout("zigzag", 4), kind, resolve_passing(method))
