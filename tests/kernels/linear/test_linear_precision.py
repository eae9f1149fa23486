"""The torch kernel in 16 and 32 bits, and in float32 cut into segments, as the ranks of a group have them."""

import math
from collections import Counter
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from longctx.kernels.linear.affine import Affine
from longctx.kernels.linear.contract import Cuts
from longctx.kernels.linear.op import linear_attention
from longctx.kernels.linear.reference import Reference
from longctx.kernels.linear.torch_kernel import TorchKernel
from tests.kernels.linear.linear_cases import GATES, Problem, everything, problem
from tests.support.pairs import Case, covering
from tests.support.tolerance import GRADIENT_FACTOR, OUTPUT_FACTOR, assert_within_budget

DRAWS = 6  # of a problem, which show torch's error
FACTORS: dict[str, Any] = {
    "dtype": (torch.float32, torch.bfloat16, torch.float16),
    "gate": GATES,
    "delta": (False, True),
    "values": ("ordinary", "mixed", "strong"),
}


@pytest.mark.parametrize("case", covering(FACTORS), ids=str)
def test_is_within_the_budget_of_the_recurrence(case: Case) -> None:
    within_budget(**case)


@pytest.mark.slow
@pytest.mark.parametrize("case", list(product(*FACTORS.values())), ids=str)
def test_all_are_within_the_budget(case: tuple[Any, ...]) -> None:
    within_budget(**dict(zip(FACTORS, case, strict=True)))


def within_budget(*, dtype: torch.dtype, gate: str, delta: bool, values: str) -> None:
    """Compare with the recurrence on the same tensors: it computes in float32 and rounds its results, as we do."""
    heads = 16 if gate == "fixed" else 4  # the gradient of the gates has one number per head: a few are no sample
    draws = [
        problem(
            gate=gate,
            delta=delta,
            lengths=(100, 29),
            values=values,
            packed=True,
            heads=heads,
            key_dim=16,
            value_dim=16,
            seed=seed,
        ).to(dtype, wide=torch.float32)
        for seed in range(DRAWS)
    ]
    exact = [everything(Reference(), drawn.to(torch.float64, wide=torch.float64), summed=True) for drawn in draws]
    plain = [everything(Reference(), drawn, summed=True) for drawn in draws]
    for name, ours in everything(TorchKernel(), draws[0], summed=True).items():
        assert ours.dtype == plain[0][name].dtype
        factor = GRADIENT_FACTOR if name.startswith("d") else OUTPUT_FACTOR
        first, *more = [(x[name], y[name]) for x, y in zip(plain, exact, strict=True)]
        assert_within_budget(ours, *first, factor=factor, name=name, more=more)


def errors(given: Problem, *, segments: int) -> dict[str, float]:
    """Return how far float32 is from float64, by root mean square, with states folded over segments."""
    single = chained(given.to(torch.float32, wide=torch.float32), segments=segments)
    double = chained(given, segments=1)
    return {name: (single[name].double() - x).square().mean().sqrt().item() for name, x in double.items()}


def chained(given: Problem, *, segments: int) -> dict[str, Tensor]:
    """Return out and gradients of a sequence in equal segments, each with the state that those before it make."""
    inputs = {name: getattr(given, name) for name in ("q", "k", "v", "g", "beta")}
    inputs = {name: None if x is None else x.clone().requires_grad_() for name, x in inputs.items()}
    cuts = Cuts(lengths=(given.q.shape[1] // segments,) * segments)
    work = TorchKernel().begin(**inputs, scale=0.25, cuts=cuts, chunk_size=32)
    summary = work.summary()
    states = [torch.zeros_like(summary.state[:, 0])]
    for i in range(segments - 1):
        states.append(Affine(summary.transition[:, i], summary.state[:, i])(states[-1]))
    out, _ = work.finish(torch.stack(states, dim=1))
    random = torch.Generator().manual_seed(5)
    out.backward(torch.randn(out.shape, generator=random, dtype=torch.float64).to(out.dtype))
    grads = {name: x.grad for name, x in inputs.items() if x is not None and x.grad is not None}
    return {"out": out.detach(), **grads}


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("gate", GATES)
def test_eight_segments_are_as_exact_as_one(gate: str, delta: bool) -> None:
    one, eight = Counter[str](), Counter[str]()
    for seed in range(DRAWS):
        shape = {"lengths": (1024,), "batch": 1, "heads": 2, "key_dim": 16, "value_dim": 16}
        given = problem(gate=gate, delta=delta, seed=seed, **shape)
        given = given.to(torch.float32, wide=torch.float32).to(torch.float64, wide=torch.float64)
        one.update(errors(given, segments=1))
        eight.update(errors(given, segments=8))
    if gate == "fixed":  # one number per head, the sum over all tokens: too few for a mean of rounding errors
        del eight["g"]
    for name, error in eight.items():
        assert error <= 1.1 * one[name], f"{name}: {error:.3e} in eight segments, {one[name]:.3e} in one"


def test_a_head_that_forgets_everything_at_once():
    """A fixed gate of -inf keeps nothing but the token itself, and has no gradient."""
    q, k, v = torch.randn(3, 1, 9, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    g = torch.tensor([-math.inf, -0.1], dtype=torch.float64, requires_grad=True)
    out, _ = linear_attention(q, k, v, g=g, chunk_size=4, kernel="torch")
    want, _ = linear_attention(q, k, v, g=g, kernel="reference")
    torch.testing.assert_close(out, want, rtol=0, atol=1e-12)
    out.sum().backward()
    assert g.grad[0] == 0 and g.grad[1] != 0
