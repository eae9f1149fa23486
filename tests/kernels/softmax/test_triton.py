"""The Triton kernels of softmax attention: on the CPU under Triton's interpreter, and on a device.

In the interpreter's worker every `torch.empty` is full of NaN.
"""

import mmap
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from longctx.kernels.contract import Request, Scores, Work, WorkList, whole
from longctx.kernels.mask import causal, documents, full, prefix_lm, sliding_window
from longctx.kernels.merge import empty_partial
from longctx.kernels.positions import Segment, cut
from longctx.kernels.softmax.delta import row_delta
from longctx.kernels.softmax.reference import ReferenceKernel
from longctx.kernels.softmax.triton_kernel import TritonKernel
from longctx.kernels.tiles import tiles_between
from tests.kernels.softmax.cases import (
    assert_low_precision,
    assert_within_budgets,
    dense,
    inputs,
    poisoned,
    run,
    tiles_of,
)
from tests.support.pairs import covering
from tests.support.triton_softmax import small_blocks
from tests.support.triton_worker import Worker, interpreter

__all__ = ["interpreter"]

REFERENCE = ReferenceKernel()
BOUNDS = (0, 1, 20, 21, 45)
MASKS = {
    "full": full(),
    "causal": causal(),
    "window": sliding_window(9),
    "two_sided": sliding_window(3, 2),
    "sinks": sliding_window(5, sinks=3),
    "documents": documents(BOUNDS) & causal(),
    "documents_sinks": documents(BOUNDS) & sliding_window(4, sinks=2),
    "prefix": prefix_lm(11),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CASES = covering(
    {
        "mask": tuple(MASKS),
        "dtype": tuple(DTYPES),
        "heads": ((2, 2), (4, 2), (3, 1)),
        "dims": ((16, 16), (24, 40), (48, 17), (80, 80)),
        "softcap": (None, 2.0),
        "persistent": (False, True),
        "tokens": (45, 33),
    },
    legal=lambda case: case.get("tokens") != 33 or case.get("mask") not in ("documents", "documents_sinks"),
)


def check(case: dict[str, object], device: str = "cpu") -> None:
    tokens, dims, dtype = case["tokens"], case["dims"], DTYPES[case["dtype"]]
    args = inputs(*case["heads"], dtype, head_dim=dims[0], v_head_dim=dims[1], tokens=tokens, batch=1)
    args = [x.to(device) for x in args]
    kernel = TritonKernel(tiles=small_blocks(persistent=case["persistent"]))
    assert_low_precision(kernel, args, MASKS[case["mask"]], softcap=case["softcap"])


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_every_pair_of_features(interpreter: Worker, case: dict[str, object]) -> None:
    interpreter.run(check, case)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_every_pair_of_features_on_a_device(case: dict[str, object]) -> None:
    check(case, "cuda")


def committed_blocks(dtype: torch.dtype, dims: tuple[int, int], tokens: int, device: str = "cpu") -> None:
    args = inputs(2, 1, dtype, head_dim=dims[0], v_head_dim=dims[1], tokens=tokens, batch=1)
    assert_low_precision(TritonKernel(), [x.to(device) for x in args], causal())


@pytest.mark.parametrize(("dtype", "dims"), [(torch.bfloat16, (128, 128)), (torch.float16, (192, 128))])
def test_blocks_of_the_committed_table(interpreter: Worker, dtype: torch.dtype, dims: tuple[int, int]) -> None:
    interpreter.run(committed_blocks, dtype, dims, 150)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES.values())
@pytest.mark.parametrize("dims", [(16, 16), (64, 64), (96, 96), (128, 128), (192, 128), (256, 256)])
def test_blocks_of_the_committed_table_on_a_device(dtype: torch.dtype, dims: tuple[int, int]) -> None:
    committed_blocks(dtype, dims, 1000, "cuda")


def few_tokens() -> list[tuple[list[Tensor], list[Tensor]]]:
    kernel, found = TritonKernel(tiles=small_blocks()), []
    for tokens in (1, 2, 16, 17):
        args = inputs(2, 1, torch.float32, tokens=tokens, batch=1)
        found.append((run(kernel, *args, causal()), dense(*args, causal())))
    return found


def test_few_tokens(interpreter: Worker) -> None:
    """Of so few torch may well be exact: no budget."""
    for ours, want in interpreter.run(few_tokens):
        for a, b in zip(ours, want, strict=True):
            torch.testing.assert_close(a, b)


def two_hops(dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Attend to two shards of stripes one after the other: our results, plain torch's in the dtype, the truth."""
    q, k, v, dout = inputs(4, 2, dtype, tokens=60, batch=2)
    mask, scores = documents((0, 7, 8, 33, 60)) & causal(), Scores(softmax_scale=0.25)
    shards = [(Segment(rank, 2, 30),) for rank in range(2)]
    places = [torch.arange(rank, 60, 2) for rank in range(2)]
    kernel, rank = TritonKernel(tiles=small_blocks()), 1
    mine = places[rank]
    partial = empty_partial(q[:, mine], v_head_dim=v.shape[-1])
    works = []
    for other in range(2):
        queries, keys = (cut(shards[each], mask.bounds(60)) for each in (rank, other))
        works.append(whole(tiles_between(queries, keys, mask=mask, total=60), heads=4, kv_heads=2))
        there = places[other]
        kernel.forward(q[:, mine], k[:, there], v[:, there], work=works[-1], scores=scores, partial=partial)
    dq = torch.zeros(2, 30, 4, 16)
    dk, dv = (torch.zeros(2, 60, 2, 16) for _ in range(2))
    rows = {"dout": dout[:, mine], "delta": row_delta(dout[:, mine], partial.out.to(dtype)), "lse": partial.lse}
    for other, work in enumerate(works):
        there = places[other]
        dk_part, dv_part = (torch.ones(2, 30, 2, 16) for _ in range(2))  # gradients are added to what is there
        kernel.backward(
            *(q[:, mine], k[:, there], v[:, there]), work=work, scores=scores, **rows, dq=dq, dk=dk_part, dv=dv_part
        )
        dk[:, there], dv[:, there] = dk_part - 1, dv_part - 1
    own_dout = torch.zeros_like(dout)
    own_dout[:, mine] = dout[:, mine]
    found = [dense(*(x.to(to) for x in (q, k, v, own_dout)), mask) for to in (dtype, torch.float64)]
    for results in found:
        results[0], results[1], results[2] = results[0][:, mine], results[1][:, :, mine], results[2][:, mine]
    return [partial.out, partial.lse, dq, dk, dv], *found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_goes_on_from_what_earlier_hops_left(interpreter: Worker, dtype: torch.dtype) -> None:
    assert_within_budgets(*interpreter.run(two_hops, dtype))


def odd_memory(last_stride: int) -> tuple[list[Tensor], list[Tensor]]:
    args = inputs(4, 2, torch.float32, tokens=45, batch=2)
    odd = [poisoned(x, last_stride=last_stride) for x in args]
    kernel = TritonKernel(tiles=small_blocks())
    return [run(kernel, *x, MASKS["documents_sinks"]) for x in (args, odd)]


@pytest.mark.parametrize("last_stride", [1, 2])
def test_strides_and_poisonous_neighbours(interpreter: Worker, last_stride: int) -> None:
    plain, odd = interpreter.run(odd_memory, last_stride)
    assert all(a.equal(b) for a, b in zip(plain, odd, strict=True))


def several_lists(kernel_name: str) -> list[Tensor]:
    """Other masks for other rows and heads, two of which share a KV head; a row and a head with nothing to do."""
    q, k, v, dout = inputs(4, 2, torch.float32, tokens=45, batch=2)
    near, all_before = (tiles_of(mask, 45) for mask in (MASKS["sinks"], causal()))
    work = WorkList(
        (
            Work(slice(0, 1), slice(0, 4), slice(0, 2), all_before),
            Work(slice(1, 2), slice(0, 1), slice(0, 1), near),
            Work(slice(1, 2), slice(1, 2), slice(0, 1), all_before),
            Work(slice(1, 2), slice(2, 3), slice(1, 2), near),
        )
    )
    kernel = TritonKernel(tiles=small_blocks()) if kernel_name == "triton" else ReferenceKernel()
    scores, partial = Scores(softmax_scale=0.25), empty_partial(q, v_head_dim=16)
    kernel.forward(q, k, v, work=work, scores=scores, partial=partial)
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    rows = {"dout": dout, "delta": row_delta(dout, partial.out), "lse": partial.lse}
    kernel.backward(q, k, v, work=work, scores=scores, **rows, dq=dq, dk=dk, dv=dv)
    assert (partial.out[1, :, 3] == 0).all() and torch.isneginf(partial.lse[1, 3]).all() and (dq[1, :, 3] == 0).all()
    return [partial.out, partial.lse, dq, dk, dv]


def test_a_hop_of_several_lists_in_one_call(interpreter: Worker) -> None:
    ours, want = interpreter.run(several_lists, "triton"), several_lists("reference")
    for a, b in zip(ours, want, strict=True):
        torch.testing.assert_close(a, b)


def blind_rows() -> list[Tensor]:
    """Queries before all keys, then keys: rows with nothing to see, in blocks with others and alone."""
    q, k, v, dout = inputs(2, 1, torch.bfloat16, tokens=45, batch=1)
    queries, keys = (cut((Segment(start, 1, 45),), (0, 65)) for start in (0, 20))
    work = whole(tiles_between(queries, keys, mask=causal(), total=65), heads=2, kv_heads=1)
    kernel, scores = TritonKernel(tiles=small_blocks()), Scores(softmax_scale=0.25)
    partial = empty_partial(q, v_head_dim=16)
    k[:, 25:] = torch.finfo(torch.bfloat16).max  # hidden; in blocks with what is visible
    kernel.forward(q, k, v, work=work, scores=scores, partial=partial)
    dq, dk, dv = (torch.zeros_like(x, dtype=torch.float32) for x in (q, k, v))
    rows = {"dout": dout, "delta": row_delta(dout, partial.out), "lse": partial.lse}
    kernel.backward(q, k, v, work=work, scores=scores, **rows, dq=dq, dk=dk, dv=dv)
    return [partial.out, partial.lse, dq, dk, dv]


def test_rows_without_keys_stay_zero_and_give_no_gradient(interpreter: Worker) -> None:
    out, lse, dq, dk, dv = interpreter.run(blind_rows)
    assert (out[:, :20] == 0).all() and (out[:, 20:] != 0).any(-1).all()
    assert torch.isneginf(lse[:, :, :20]).all() and torch.isfinite(lse[:, :, 20:]).all()
    assert (dq[:, :20] == 0).all() and (dk[:, 25:] == 0).all() and (dv[:, 25:] == 0).all()
    assert all(torch.isfinite(x).all() for x in (out, dq, dk, dv))


def twice() -> bool:
    args, kernel = inputs(4, 1, torch.bfloat16, tokens=45, batch=1), TritonKernel(tiles=small_blocks())
    first, second = (run(kernel, *args, causal()) for _ in range(2))
    return all(a.equal(b) for a, b in zip(first, second, strict=True))


def test_bitwise_repeatable(interpreter: Worker) -> None:
    assert interpreter.run(twice)


def beyond_int32() -> tuple[list[Tensor], list[Tensor]]:
    """Rows of the batch and heads more than 2^31 elements apart, in memory of which only those pages exist."""
    args = inputs(2, 2, torch.bfloat16, tokens=20, batch=2)
    gap = 2**31 + 64

    def spread(x: Tensor) -> Tensor:
        batch, tokens, heads, dim = x.shape
        elements = (batch - 1 + heads - 1) * gap + tokens * dim
        memory = mmap.mmap(-1, 2 * elements, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)  # MAP_NORESERVE
        flat = torch.frombuffer(memory, dtype=x.dtype)
        return flat.as_strided(x.shape, (gap, dim, gap, 1)).copy_(x)

    kernel = TritonKernel(tiles=small_blocks())
    return run(kernel, *args, causal()), run(kernel, *(spread(x[:1]) for x in args), causal())


def test_offsets_beyond_int32(interpreter: Worker) -> None:
    near, far = interpreter.run(beyond_int32)
    assert all(b.equal(a[:1]) for a, b in zip(near, far, strict=True))


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"dtype": torch.float64}, "float64"),
        ({"head_dim": 257}, "head dims go up to 256; given 257 and 64"),
        ({"v_head_dim": 288}, "256"),
        ({"predicate": True}, "predicate"),
        ({"device_type": "cpu"}, "interpreter"),
    ],
)
def test_refuses(changed: dict[str, object], reason: str) -> None:
    request = Request(
        device_type="cuda", dtype=torch.bfloat16, head_dim=64, v_head_dim=64, num_heads=4, num_kv_heads=2, softcap=True
    )
    assert TritonKernel().unsupported(request) is None
    assert reason in str(TritonKernel().unsupported(replace(request, **changed)))  # type: ignore[arg-type]


def large_scores() -> list[tuple[str, float, float]]:
    """Few tokens and scores of tens, where lse's last digit shows in the gradients: our errors and the reference's."""
    found = []
    for seed, (tokens, scale) in enumerate(((4, 1.0), (24, 1.0), (24, 3.0), (7, 3.0))):
        generator = torch.Generator().manual_seed(seed)
        args = [torch.randn(1, tokens, 1, 128, generator=generator) for _ in range(4)]
        args[0] *= scale * 128**0.5  # run() scales by D ** -0.5
        truth = dense(*(x.double() for x in args), causal())
        ours, theirs = (run(kernel, *args, causal()) for kernel in (TritonKernel(tiles=small_blocks()), REFERENCE))
        for name, a, b, ref in zip(("out", "lse", "dq", "dk", "dv"), ours, theirs, truth, strict=True):
            found.append((name, (a - ref).abs().max().item(), (b - ref).abs().max().item()))
    return found


def test_large_scores_cost_no_more_than_in_the_reference(interpreter: Worker) -> None:
    for name, ours, reference in interpreter.run(large_scores):
        assert ours <= 2 * reference, (name, ours, reference)


def only_weights() -> Tensor:
    args = inputs(1, 1, torch.float32, tokens=20, batch=1)
    args[0] *= 50
    return run(TritonKernel(tiles=small_blocks()), *args, sliding_window(0))[4] - args[3]


def test_a_rows_only_weight_is_one(interpreter: Worker) -> None:
    assert interpreter.run(only_weights).abs().max() < 1e-5
