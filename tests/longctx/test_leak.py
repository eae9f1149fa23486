"""Leak probes: perturb one token and see that exactly the allowed outputs move, in every layout."""

import pytest
import torch

from longctx.kernels.mask import causal, documents, plain_masks, sliding_window
from longctx.parallel.layout import Layout
from longctx.parallel.loopback import run_ranks
from tests.support.attention import (
    LAYOUTS,
    SCHEDULES,
    Problem,
    make_mask,
    make_problem,
    make_schedule,
    sharded,
    together,
)
from tests.support.attention import MASKS as ALL_MASKS

CP, TOTAL = 4, 44
BOUNDS = (0, 1, 9, 10, 31, 44)
MASKS = {
    "documents": causal() & documents(BOUNDS),
    "documents_window": sliding_window(3) & documents(BOUNDS),
    "causal": causal(),
}


def outputs(layout: Layout, problem, mask, schedule: str = "ring") -> list[torch.Tensor]:
    way = make_schedule(schedule, CP)
    return together(layout, run_ranks(CP, lambda t: sharded(t, layout, problem, [mask], schedule=way, kernel="torch")))


def probes(tokens, heads):
    """Return equal rows, in each of which but the first the key and value of one of the tokens are others."""
    one = make_problem(TOTAL, heads)
    rows = (x.repeat(1 + len(tokens), 1, 1, 1) for x in (one.q, one.k, one.v, one.dout))
    problem = Problem(*rows, one.sink_logits)
    for row, token in enumerate(tokens, start=1):
        problem.k[row, token] += 1.0
        problem.v[row, token] += 1.0
    return problem


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("mask", [name for name in ALL_MASKS if name != "predicate"])
def test_one_token_moves_who_sees_it_and_gets_gradients_from_them(mask, schedule):
    """Both ways: the outputs that a changed key moves, and the keys whose gradients a single row's loss reaches."""
    layout, chosen = Layout("zigzag", CP), make_mask(mask, TOTAL, heads=4)
    positions = torch.arange(TOTAL)
    allowed = torch.stack([each.allowed(positions, positions) for each in plain_masks(chosen)]).expand(4, -1, -1)
    tokens = (0, 9, 30)
    problem = probes(tokens, (4, 4))
    for row, token in enumerate(tokens, start=1):
        problem.dout[row, :token] = 0
        problem.dout[row, token + 1 :] = 0  # only this token has a loss
    out, _, _, dk, dv, _ = outputs(layout, problem, chosen, schedule)
    for row, token in enumerate(tokens, start=1):
        assert torch.equal((out[row] != out[0]).any(-1).T, allowed[:, :, token])
        # A key that alone is seen has weight 1 whatever its score, so dk is 0 there: dv tells who is reached.
        assert torch.equal((dv[row] != 0).any(-1).T, allowed[:, token, :])
        assert not (dk[row] != 0).any(-1).T[~allowed[:, token, :]].any()


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("name", LAYOUTS)
def test_exactly_the_allowed_outputs_move(name, mask):
    layout = Layout(LAYOUTS[name][0], CP, LAYOUTS[name][1])
    positions = torch.arange(TOTAL)
    allowed = mask.allowed(positions, positions)
    tokens = (0, 1, 8, 9, 10, 30, 31, 43)
    out = outputs(layout, probes(tokens, (4, 2)), mask)[0]
    for row, token in enumerate(tokens, start=1):
        moved = (out[row] != out[0]).any(-1).any(-1)
        assert torch.equal(moved, allowed[:, token]), token


@pytest.mark.parametrize("name", LAYOUTS)
def test_gradients_stay_in_their_document(name):
    layout = Layout(LAYOUTS[name][0], CP, LAYOUTS[name][1])
    problem = make_problem(TOTAL, (4, 2))
    problem.dout[:, :10] = 0
    problem.dout[:, 31:] = 0  # only the document [10, 31) has a loss
    _, _, *grads, _ = outputs(layout, problem, MASKS["documents"])
    for grad in grads:
        touched = (grad != 0).any(-1).any(-1)[0]
        # The document's first token sees itself alone, with weight 1 whatever its query: its dq is 0.
        assert touched[11:31].all() and not touched[:10].any() and not touched[31:].any()
