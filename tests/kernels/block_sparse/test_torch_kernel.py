"""Sparse attention in plain torch and densely behind the kernel contract, against the formulas in float64."""

import pytest
import torch
from torch import Tensor

from longctx.kernels.block_sparse import torch_kernel
from longctx.kernels.block_sparse.contract import SparseKernel
from longctx.kernels.block_sparse.reference_kernel import ReferenceSparseKernel
from longctx.kernels.block_sparse.selection import Selection
from longctx.kernels.block_sparse.torch_kernel import TorchSparseKernel
from tests.kernels.block_sparse.sparse_cases import (
    assert_low_precision,
    blocks,
    classes,
    dense,
    everything,
    largest_error,
    problem,
    run,
)
from tests.support.pairs import Case, covering

KERNELS = {"torch": TorchSparseKernel(), "reference": ReferenceSparseKernel()}
EXACT = 1e-10


def legal(case: Case) -> bool:
    gated = case.get("weights") == "gated"
    if gated and (case.get("pattern") == "classes" or case.get("parts") in ("stripes", "backwards")):
        return False  # a slot's keys are one tile, given together
    return not (case.get("weights") == "sum" and case.get("softcap") is not None)


CASES = covering(
    {
        "kernel": tuple(KERNELS),
        "weights": ("softmax", "gated", "sum"),
        "pattern": ("blocks", "classes"),
        "heads": ((4, 4), (4, 2), (6, 2)),
        "own_heads": (False, True),
        "tokens": (37, 48),
        "block_size": (1, 4, 9),
        "parts": ("whole", "stripes", "backwards", "blocks"),
        "rows": (1, 2),
        "dims": ((8, 8), (5, 9)),
        "softcap": (None, 2.0),
    },
    legal=legal,
)


def drawn(case: Case) -> Selection:
    heads, kv_heads = case["heads"]
    make = blocks if case["pattern"] == "blocks" else classes
    return make(
        case["tokens"],
        heads=heads if case["own_heads"] else kv_heads,
        rows=case["rows"],
        block_size=case["block_size"],
    )


def parts_of(name: str, tokens: int, block_size: int) -> list[Tensor]:
    place = torch.arange(tokens)
    block = place // block_size
    return {
        "whole": [place],
        "stripes": [place[1::3], place[0::3], place[2::3]],
        "backwards": [place[tokens // 2 :].flip(0), place[: tokens // 2].flip(0)],
        "blocks": [place[block % 2 == 1], place[block % 2 == 0]],
    }[name]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_every_pair_of_features(case: Case) -> None:
    given = problem(
        drawn(case),
        heads=case["heads"][0],
        kv_heads=case["heads"][1],
        batch=2,
        dims=case["dims"],
        weights=case["weights"],
        softcap=case["softcap"],
    )
    parts = parts_of(case["parts"], case["tokens"], case["block_size"])
    assert largest_error(run(KERNELS[case["kernel"]], given, parts), dense(given)) < EXACT


@pytest.mark.parametrize("weights", ["softmax", "gated", "sum"])
@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_rows_that_see_nothing_stay_zero(kernel: SparseKernel, weights: str) -> None:
    selection = blocks(37, heads=2, rows=1, block_size=4)
    blind = (selection.hi < selection.lo).all(-1)[0]  # [T, HS]
    assert 0 < blind.sum() < blind.numel() / 2
    out, lse, dq, *others = run(kernel, problem(selection, heads=2, kv_heads=2, weights=weights))
    assert (out[0][blind] == 0).all() and (dq[0][blind] == 0).all()
    assert torch.isneginf(lse[0].T[blind]).all()
    assert weights == "sum" or torch.isfinite(lse[0].T[~blind]).all()
    assert all(torch.isfinite(x).all() for x in (out, dq, *others))


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_no_keys_at_all(kernel: SparseKernel) -> None:
    given = problem(blocks(20, heads=2, rows=1, block_size=4), heads=4, kv_heads=2)
    place = torch.arange(20)
    whole = run(kernel, given, [place])
    assert all(a.equal(b) for a, b in zip(whole, run(kernel, given, [place[:0], place, place[:0]]), strict=True))


@pytest.mark.parametrize("heads", [(4, 2), (4, 4)])
def test_a_few_queries_see_everything(heads: tuple[int, int]) -> None:
    given = problem(everything(70, heads=heads[1], block_size=2), heads=heads[0], kv_heads=heads[1])
    assert largest_error(run(TorchSparseKernel(), given), dense(given)) < EXACT


@pytest.mark.parametrize("weights", ["softmax", "gated", "sum"])
def test_a_few_pairs_and_a_few_scores_at_a_time(monkeypatch: pytest.MonkeyPatch, weights: str) -> None:
    monkeypatch.setattr(torch_kernel, "PAIRS_AT_ONCE", 50)
    monkeypatch.setattr(torch_kernel, "SCORES_AT_ONCE", {"cpu": 1, "cuda": 1})
    monkeypatch.setattr(torch_kernel, "WIDTH", 4)  # blocks of 9 are cut in three, but not those of gates
    given = problem(blocks(61, heads=2, rows=1, block_size=9), heads=4, kv_heads=2, batch=2, weights=weights)
    assert largest_error(run(TorchSparseKernel(), given), dense(given)) < EXACT


@pytest.mark.parametrize("weights", ["softmax", "gated", "sum"])
def test_bitwise_repeatable(weights: str) -> None:
    selection = blocks(61, heads=2, rows=1, block_size=4)
    given = problem(selection, heads=4, kv_heads=2, weights=weights, dtype=torch.float32)
    first, second = (run(TorchSparseKernel(), given) for _ in range(2))
    assert all(a.equal(b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("weights", ["softmax", "gated", "sum"])
@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_low_precision(kernel: SparseKernel, weights: str, dtype: torch.dtype) -> None:
    selection = blocks(61, heads=2, rows=1, block_size=8)
    given = problem(selection, heads=4, kv_heads=2, batch=2, dims=(32, 32), weights=weights, dtype=dtype)
    assert_low_precision(kernel, given, parts_of("blocks", 61, 8))
