"""Leak probes: perturb one token and see that exactly the allowed outputs move, in every layout."""

import pytest
import torch

from longctx.kernels.mask import causal, documents, sliding_window
from longctx.parallel.layout import Layout
from longctx.parallel.loopback import run_ranks
from tests.support.attention import LAYOUTS, make_problem, sharded, together

CP, TOTAL = 4, 44
BOUNDS = (0, 1, 9, 10, 31, 44)
MASKS = {
    "documents": causal() & documents(BOUNDS),
    "documents_window": sliding_window(3) & documents(BOUNDS),
    "causal": causal(),
}


def outputs(layout: Layout, problem, mask) -> torch.Tensor:
    ranks = run_ranks(CP, lambda t: sharded(t, layout, problem, [mask], schedule="ring", kernel="torch"))
    return together(layout, ranks)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("name", LAYOUTS)
def test_exactly_the_allowed_outputs_move(name, mask):
    layout = Layout(LAYOUTS[name][0], CP, LAYOUTS[name][1])
    positions = torch.arange(TOTAL)
    allowed = mask.allowed(positions, positions)
    before = outputs(layout, make_problem(TOTAL, (4, 2)), mask)[0]
    for token in (0, 1, 8, 9, 10, 30, 31, 43):
        problem = make_problem(TOTAL, (4, 2))
        problem.k[:, token] += 1.0
        problem.v[:, token] += 1.0
        moved = (outputs(layout, problem, mask)[0] != before).any(-1).any(-1)[0]
        assert torch.equal(moved, allowed[:, token]), token


@pytest.mark.parametrize("name", LAYOUTS)
def test_gradients_stay_in_their_document(name):
    layout = Layout(LAYOUTS[name][0], CP, LAYOUTS[name][1])
    problem = make_problem(TOTAL, (4, 2))
    problem.dout[:, :10] = 0
    problem.dout[:, 31:] = 0  # only the document [10, 31) has a loss
    _, _, *grads = outputs(layout, problem, MASKS["documents"])
    for grad in grads:
        touched = (grad != 0).any(-1).any(-1)[0]
        assert touched[10:31].all() and not touched[:10].any() and not touched[31:].any()
