"""The Triton kernels of sparse attention: on the CPU under Triton's interpreter, and on a device.

In the interpreter's worker every `torch.empty` is full of NaN.
"""

import mmap
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from longctx.kernels.block_sparse.triton import hop
from longctx.kernels.block_sparse.triton import run as launches
from longctx.kernels.block_sparse.triton_kernel import TritonSparseKernel
from longctx.kernels.contract import Request
from longctx.kernels.merge import Partial, empty_partial
from longctx.kernels.softmax.delta import row_delta
from tests.kernels.block_sparse.sparse_cases import (
    Problem,
    assert_low_precision,
    blocks,
    classes,
    everything,
    problem,
    run,
)
from tests.kernels.softmax.cases import poisoned
from tests.support.pairs import Case, covering
from tests.support.triton_sparse import small_blocks
from tests.support.triton_worker import Worker, interpreter

__all__ = ["interpreter"]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def legal(case: Case) -> bool:
    if case.get("weights") == "gated" and (case.get("pattern") == "classes" or case.get("parts") == "stripes"):
        return False  # a slot's keys are one tile, given together
    return not (case.get("weights") == "sum" and case.get("softcap") is not None)


CASES = covering(
    {
        "dtype": tuple(DTYPES),
        "weights": ("softmax", "gated", "sum"),
        "pattern": ("blocks", "classes"),
        "heads": ((2, 2), (4, 2), (3, 1)),
        "own_heads": (False, True),
        "dims": ((16, 16), (24, 40), (80, 17)),
        "block_size": (5, 16, 32),
        "softcap": (None, 2.0),
        "parts": ("whole", "stripes"),
        "tokens": (21, 35),
        "rows": ((1, 1), (2, 1), (2, 2)),
    },
    legal=legal,
)


def drawn(case: Case) -> Problem:
    heads, kv_heads = case["heads"]
    batch, rows = case["rows"]
    make = blocks if case["pattern"] == "blocks" else classes
    selection = make(
        case["tokens"], heads=heads if case["own_heads"] else kv_heads, rows=rows, block_size=case["block_size"]
    )
    return problem(
        selection,
        heads=heads,
        kv_heads=kv_heads,
        batch=batch,
        dims=case["dims"],
        weights=case["weights"],
        softcap=case["softcap"],
        dtype=DTYPES[case["dtype"]],
    )


def check(case: Case, device: str = "cpu") -> None:
    parts = None
    if case["parts"] == "stripes":
        parts = [torch.arange(start, case["tokens"], 2, device=device).flip(0) for start in (1, 0)]
    assert_low_precision(TritonSparseKernel(tiles=small_blocks()), drawn(case).on(device), parts)


IDS = ["-".join(map(str, case.values())) for case in CASES]


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_every_pair_of_features(interpreter: Worker, case: Case) -> None:
    interpreter.run(check, case)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_every_pair_of_features_on_a_device(case: Case) -> None:
    check(case, "cuda")


def committed_blocks(dtype: torch.dtype, dims: tuple[int, int], tokens: int, device: str = "cpu") -> None:
    selection = blocks(tokens, heads=1, rows=1, block_size=64, slots=3)
    given = problem(selection, heads=4, kv_heads=1, dims=dims, dtype=dtype)
    assert_low_precision(TritonSparseKernel(), given.on(device))


def test_blocks_of_the_committed_table(interpreter: Worker) -> None:
    interpreter.run(committed_blocks, torch.bfloat16, (128, 128), 150)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES.values())
@pytest.mark.parametrize("dims", [(16, 16), (64, 64), (96, 96), (128, 128), (192, 128), (256, 256)])
def test_blocks_of_the_committed_table_on_a_device(dtype: torch.dtype, dims: tuple[int, int]) -> None:
    committed_blocks(dtype, dims, 1000, "cuda")


def few_at_a_time(weights: str) -> None:
    """Take the pairs in several parts, and the columns of a sum in two programs."""
    before = hop.ROWS_AT_ONCE, launches.COLUMNS
    hop.ROWS_AT_ONCE, launches.COLUMNS = 64, 128
    selection = (
        everything(45, heads=1, block_size=5) if weights == "softmax" else blocks(45, heads=1, rows=1, block_size=5)
    )
    try:
        given = problem(selection, heads=2, kv_heads=1, dims=(16, 16), weights=weights, dtype=torch.float32)
        assert_low_precision(TritonSparseKernel(tiles=small_blocks()), given)
    finally:
        hop.ROWS_AT_ONCE, launches.COLUMNS = before


@pytest.mark.parametrize("weights", ["softmax", pytest.param("gated", marks=pytest.mark.slow)])
def test_a_few_pairs_at_a_time(interpreter: Worker, weights: str) -> None:
    interpreter.run(few_at_a_time, weights)


def twice(device: str = "cpu") -> bool:
    given = problem(blocks(30, heads=1, rows=1, block_size=5), heads=2, kv_heads=1, dtype=torch.bfloat16).on(device)
    first, second = (run(TritonSparseKernel(tiles=small_blocks()), given) for _ in range(2))
    return all(a.equal(b) for a, b in zip(first, second, strict=True))


def test_bitwise_repeatable(interpreter: Worker) -> None:
    assert interpreter.run(twice)


@pytest.mark.gpu
def test_bitwise_repeatable_on_a_device() -> None:
    assert twice("cuda")


def odd_memory() -> tuple[list[Tensor], list[Tensor]]:
    """Odd strides, NaN beside what is given, and accumulators that are parts of something larger."""
    given = problem(blocks(20, heads=1, rows=1, block_size=5), heads=2, kv_heads=1, dtype=torch.float32)
    names = ("q", "k", "v", "dout")
    odd = replace(given, **{name: poisoned(getattr(given, name), last_stride=2) for name in names})
    kernel, place = TritonSparseKernel(tiles=small_blocks()), torch.arange(20)
    found = []
    for each, wide in ((given, False), (odd, True)):
        partial = empty_partial(each.q, v_head_dim=8)
        grads = [torch.zeros_like(x) for x in (given.q, given.k, given.v)]
        if wide:
            partial = Partial(
                poisoned(partial.out, last_stride=1), poisoned(partial.lse[..., None], last_stride=2)[..., 0]
            )
            grads = [poisoned(x, last_stride=2) for x in grads]
        what = {"selection": each.selection, "k_positions": place, "weights": "softmax", "gates": None}
        what |= {"scores": each.scores}
        kernel.forward(each.q, each.k, each.v, **what, partial=partial)
        rows = {"dout": each.dout, "delta": row_delta(each.dout, partial.out), "lse": partial.lse}
        what |= {"dq": grads[0], "dk": grads[1], "dv": grads[2], "dgates": None}
        kernel.backward(each.q, each.k, each.v, **what, **rows)
        found.append([partial.out.clone(), partial.lse.clone(), *(x.clone() for x in grads)])
    return found[0], found[1]


def test_strides_and_poisonous_neighbours(interpreter: Worker) -> None:
    plain, odd = interpreter.run(odd_memory)
    assert all(a.equal(b) for a, b in zip(plain, odd, strict=True))


def beyond_int32() -> tuple[list[Tensor], list[Tensor]]:
    """Heads of k and v more than 2^31 elements apart, in memory of which only those pages exist."""
    given = problem(blocks(20, heads=2, rows=1, block_size=5), heads=2, kv_heads=2, dtype=torch.bfloat16)
    gap = 2**31 + 64

    def spread(x: Tensor) -> Tensor:
        _, tokens, heads, dim = x.shape
        size = 2 * ((heads - 1) * gap + tokens * dim)
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)  # MAP_NORESERVE
        flat = torch.frombuffer(memory, dtype=x.dtype)
        return flat.as_strided(x.shape, (gap, dim, gap, 1)).copy_(x)

    far = replace(given, k=spread(given.k), v=spread(given.v))
    place, kernel = torch.arange(20), TritonSparseKernel(tiles=small_blocks())
    found = []
    for each in (given, far):  # not by run(), which copies keys
        partial = empty_partial(each.q, v_head_dim=8)
        what = {"selection": each.selection, "k_positions": place, "weights": "softmax", "gates": None}
        what |= {"scores": each.scores}
        kernel.forward(each.q, each.k, each.v, **what, partial=partial)
        grads = {name: torch.zeros(given.q.shape) for name in ("dq", "dk", "dv")}
        rows = {"dout": each.dout, "delta": row_delta(each.dout, partial.out), "lse": partial.lse}
        kernel.backward(each.q, each.k, each.v, **what, **rows, **grads, dgates=None)
        found.append([partial.out, partial.lse, *grads.values()])
    return found[0], found[1]


def test_offsets_beyond_int32(interpreter: Worker) -> None:
    near, far = interpreter.run(beyond_int32)
    assert all(a.equal(b) for a, b in zip(near, far, strict=True))


def hidden() -> list[Tensor]:
    """Keys that nobody sees, in tiles with others, are as large as numbers get; lse is far below and above 0."""
    given = problem(blocks(30, heads=1, rows=1, block_size=5), heads=2, kv_heads=1, dtype=torch.bfloat16)
    given.q.mul_(40)
    selection = replace(given.selection, hi=given.selection.hi.clamp(max=18))
    given.k[:, 19:] = torch.finfo(torch.bfloat16).max
    return run(TritonSparseKernel(tiles=small_blocks()), replace(given, selection=selection))


def test_what_is_hidden_is_not_computed_with(interpreter: Worker) -> None:
    out, lse, dq, dk, dv = interpreter.run(hidden)
    assert all(torch.isfinite(x).all() for x in (out, dq, dk, dv)) and not torch.isnan(lse).any()
    assert (dk[:, 19:] == 0).all() and (dv[:, 19:] == 0).all()


def far_below_zero() -> list[Tensor]:
    """Scores of -283, in tiles of 15 keys: where a block of 16 has no key, a score of 0 would be exp(283) too much."""
    given = problem(everything(45, heads=1, block_size=15), heads=2, kv_heads=1, dtype=torch.float32)
    given.q.fill_(10)
    given.k.fill_(-10)
    return run(TritonSparseKernel(tiles=small_blocks()), given)


def test_scores_far_below_zero(interpreter: Worker) -> None:
    out, lse, *grads = interpreter.run(far_below_zero)
    assert all(torch.isfinite(x).all() for x in (out, lse, *grads)) and lse.max() < -200


def no_keys() -> bool:
    given = problem(blocks(20, heads=1, rows=1, block_size=5), heads=2, kv_heads=1, dtype=torch.bfloat16)
    place, kernel = torch.arange(20), TritonSparseKernel(tiles=small_blocks())
    found = [run(kernel, given, parts) for parts in ([place], [place[:0], place, place[:0]])]
    return all(a.equal(b) for a, b in zip(*found, strict=True))


def test_no_keys_at_all(interpreter: Worker) -> None:
    assert interpreter.run(no_keys)


@pytest.mark.parametrize(
    ("changed", "weights", "reason"),
    [
        ({"dtype": torch.float64}, "softmax", "float64"),
        ({"head_dim": 257}, "gated", "head dims go up to 256; given 257 and 64"),
        ({"v_head_dim": 288}, "sum", "256"),
        ({"predicate": True}, "softmax", "predicate"),
        ({"device_type": "cpu"}, "softmax", "interpreter"),
        ({"softcap": True}, "sum", "not capped"),
    ],
)
def test_refuses(changed: dict[str, object], weights: str, reason: str) -> None:
    request = Request(device_type="cuda", dtype=torch.bfloat16, head_dim=64, v_head_dim=64, num_heads=4, num_kv_heads=2)
    assert TritonSparseKernel().unsupported(request, weights) is None
    assert reason in str(TritonSparseKernel().unsupported(replace(request, **changed), weights))
