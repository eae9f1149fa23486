"""The composition with the Triton kernels, under Triton's interpreter: a covering subset of the matrix, float32.

One rank's numbers within the error budget, of several draws: of so few numbers torch's largest error is luck.
"""

import pytest
import torch

from longctx.parallel.layout import Layout
from longctx.parallel.loopback import run_ranks
from tests.support.attention import (
    HEADS,
    LAYOUTS,
    MASKS,
    NAMES,
    SCHEDULES,
    SCORES,
    dense,
    make_heads,
    make_mask,
    make_problem,
    make_schedule,
    sharded,
    together,
)
from tests.support.pairs import covering
from tests.support.tolerance import GRADIENT_FACTOR, OUTPUT_FACTOR, assert_within_budget
from tests.support.triton_worker import Worker, interpreter

__all__ = ["interpreter"]

FACTORS = {
    "mask": tuple(mask for mask in MASKS if mask != "predicate"),
    "schedule": SCHEDULES,
    "layout": tuple(LAYOUTS),
    "cp": (2, 3, 4),
    "heads": HEADS,
    "scores": SCORES,
    "tokens": (7, 8),
}
PAIRS = sorted(covering(FACTORS), key=lambda case: case["cp"])
# Every value of every factor at least once: the first case that has it, of few ranks where there is one.
FIRST = {next(i for i, case in enumerate(PAIRS) if case[key] == value) for key in FACTORS for value in FACTORS[key]}
FEW = [PAIRS[index] for index in sorted(FIRST)]


def check(case: dict[str, object], device: str = "cpu") -> None:
    cp, scores = case["cp"], case["scores"]
    total, counts = cp * case["tokens"], make_heads(case["heads"], cp)
    masks = [make_mask(case["mask"], total, heads=counts[0])]
    layout, way = (
        Layout(LAYOUTS[case["layout"]][0], cp, LAYOUTS[case["layout"]][1]),
        make_schedule(case["schedule"], cp),
    )
    draws = []
    for seed in range(4):
        problem = make_problem(total, counts, head_dim=16, v_head_dim=24, seed=seed).to(torch.float32)
        plain = dense(problem, masks, scores=scores)
        draws.append((problem, plain, dense(problem.to(torch.float64), masks, scores=scores)))
    problem = draws[0][0]
    shards = type(problem)(*(x.to(device) for x in vars(problem).values()))
    ranks = run_ranks(cp, lambda t: sharded(t, layout, shards, masks, schedule=way, kernel="triton", scores=scores))
    for index, ours in enumerate(together(layout, ranks)):
        assert_within_budget(
            ours.cpu(),
            draws[0][1][index],
            draws[0][2][index],
            factor=OUTPUT_FACTOR if index < 2 else GRADIENT_FACTOR,
            name=NAMES[index],
            more=[(plain[index], truth[index]) for _, plain, truth in draws[1:]],
        )


def name(case: dict[str, object]) -> str:
    return "-".join(map(str, case.values()))


@pytest.mark.parametrize("case", FEW, ids=name)
def test_some_pairs_of_factors(interpreter: Worker, case: dict[str, object]) -> None:
    interpreter.run(check, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in PAIRS if case not in FEW], ids=name)
def test_every_pair_of_factors(interpreter: Worker, case: dict[str, object]) -> None:
    interpreter.run(check, case)


@pytest.mark.gpu
@pytest.mark.parametrize("case", PAIRS, ids=name)
def test_every_pair_of_factors_on_a_device(case: dict[str, object]) -> None:
    check(case, "cuda")
