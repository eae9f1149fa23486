"""Chunks equal the recurrence, in float64 and for every kind: values, gradients, maps of segments."""

from typing import Any

import pytest
import torch

from longctx.kernels.linear.reference import Reference
from longctx.kernels.linear.torch_kernel import TorchKernel
from tests.kernels.linear.linear_cases import GATES, VALUES, Problem, everything, problem
from tests.support.pairs import Case, covering
from tests.support.tolerance import max_error

TOLERANCE = 1e-9
LENGTHS = {
    "one": (1,),
    "63": (63,),
    "100": (100,),
    "257": (257,),
    "zigzag": (33, 32),
    "odd": (1, 30, 63, 6),
    "striped": (16,) * 6,
    "tokens": (1,) * 9,
}
FACTORS: dict[str, Any] = {
    "gate": GATES,
    "delta": (False, True),
    "values": VALUES,
    "lengths": tuple(LENGTHS),
    "packed": (False, True),
    "chunk_size": (None, 16, 64),
    "summed": (False, True),
    "entered": (False, True),
    "sizes": ((2, 2, 5, 3), (1, 1, 8, 9), (2, 3, 1, 4), (1, 2, 4, 1)),
}


def legal(case: Case) -> bool:
    """Without gates they have no values."""
    return case.get("gate") != "none" or case.get("values", "ordinary") == "ordinary"


def check(case: Case) -> None:
    batch, heads, key_dim, value_dim = case["sizes"]
    given = problem(
        **{name: case[name] for name in ("gate", "delta", "values", "packed", "entered")},
        lengths=LENGTHS[case["lengths"]],
        batch=batch,
        heads=heads,
        key_dim=key_dim,
        value_dim=value_dim,
    )
    same(given, chunk_size=case["chunk_size"], summed=case["summed"])


def same(given: Problem, *, chunk_size: int | None, summed: bool) -> None:
    expected = everything(Reference(), given, summed=summed)
    found = everything(TorchKernel(), given, chunk_size=chunk_size, summed=summed)
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].shape == value.shape, name
        scale = max(1.0, value.abs().max().item())  # sums over 257 tokens of keys that are not normalised
        error = max_error(found[name], value)
        assert error <= TOLERANCE * scale, f"{name}: off by {error:.3e}"


@pytest.mark.parametrize("case", covering(FACTORS, legal=legal), ids=str)
def test_equals_the_recurrence(case: Case) -> None:
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("gate", GATES)
def test_every_kind_at_every_length(gate: str, delta: bool, values: str, lengths: str) -> None:
    if not legal({"gate": gate, "values": values}):
        values = "ordinary"
    for packed in (False, True):
        for summed in (False, True):
            given = problem(gate=gate, delta=delta, values=values, lengths=LENGTHS[lengths], packed=packed)
            same(given, chunk_size=32, summed=summed)


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("gate", GATES)
def test_blocks_of_chunks_pass_states_on(gate: str, delta: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments in several blocks, blocks of several segments, in one call."""
    monkeypatch.setattr("longctx.kernels.linear.sweep.BLOCK_ON_CPU", 64)
    given = problem(gate=gate, delta=delta, lengths=(4, 4, 70, 8, 8, 3), packed=True, values="ordinary")
    for summed in (False, True):
        same(given, chunk_size=4, summed=summed)


def test_one_row_of_documents_serves_all_sequences() -> None:
    same(problem(gate="scalar", delta=True, lengths=(40, 20), packed=True, rows=1), chunk_size=16, summed=True)


@pytest.mark.parametrize("gate", ["scalar", "diagonal"])
def test_gates_that_forget_everything_have_finite_gradients(gate: str) -> None:
    given = problem(gate=gate, delta=True, lengths=(50,), values="mixed")
    assert given.g is not None
    given.g[:, ::7] = float("-inf")
    for name, value in everything(TorchKernel(), given, summed=True).items():
        assert value.isfinite().all(), name


def test_only_what_is_asked_for_has_gradients() -> None:
    given = problem(gate="scalar", delta=True, lengths=(20,))
    work = TorchKernel().begin(
        given.q,
        given.k.requires_grad_(),
        given.v,
        g=given.g,
        beta=given.beta,
        scale=1.0,
        cuts=given.cuts,
        chunk_size=None,
    )
    (dk,) = torch.autograd.grad(work.summary().state.sum(), given.k)  # the outputs get no gradient at all
    reference = Reference().begin(
        given.q, given.k, given.v, g=given.g, beta=given.beta, scale=1.0, cuts=given.cuts, chunk_size=None
    )
    (expected,) = torch.autograd.grad(reference.summary().state.sum(), given.k)
    torch.testing.assert_close(dk, expected, rtol=0, atol=TOLERANCE)


def test_gates_that_are_no_numbers_are_seen_in_the_summary() -> None:
    given = problem(gate="scalar", delta=False, lengths=(20,))
    assert given.g is not None
    g = given.g.index_fill(1, torch.tensor([3]), torch.nan)
    summary = (
        TorchKernel()
        .begin(given.q, given.k, given.v, g=g, beta=None, scale=1.0, cuts=given.cuts, chunk_size=None)
        .summary()
    )
    assert summary.state.isnan().all() and summary.transition.isnan().all()


def test_nothing_wants_a_gradient() -> None:
    given = problem(gate="diagonal", delta=False, lengths=(20,))
    tensors = (given.q, given.k, given.v)
    work = TorchKernel().begin(*tensors, g=given.g, beta=None, scale=1.0, cuts=given.cuts, chunk_size=8)
    out, final = work.finish(None)
    assert not out.requires_grad and not final.requires_grad
