"""Triton's kernels without a decay, with a fixed one and with one per token: on the CPU, and on a device.

Every case compares out, the states after segments, summaries and all gradients (`triton_linear.compare`).
"""

from dataclasses import replace

import pytest
import torch

from longctx.kernels.linear.contract import LinearRequest
from longctx.kernels.linear.op import linear_attention
from longctx.kernels.linear.triton_kernel import TritonKernel
from tests.support.triton_linear import Case, compare, small_tiles
from tests.support.triton_worker import Worker, interpreter

__all__ = ["interpreter"]

PACKED = ((0, 1, 20, 21, 25), (0, 16, 24, 25))
# Segments of one token, of less than a chunk and of several; documents that begin at bounds and between them.
SEGMENTS = (18, 1, 16)
PACKED_SEGMENTS = ((0, 2, 19, 20, 35), (0, 18, 25, 34, 35))

CASES = [
    Case("none", lengths=(21,)),
    Case("fixed", lengths=(21,), heads=4),
    Case("scalar", lengths=(21,), heads=2),
    Case("scalar", lengths=(21,), gates="zero"),
    Case("scalar", lengths=(21,), gates="mixed"),
    Case("scalar", lengths=SEGMENTS, documents=PACKED_SEGMENTS),
    Case("none", lengths=SEGMENTS, documents=PACKED_SEGMENTS, dtype=torch.bfloat16),
    Case("scalar", lengths=(25,), documents=PACKED, gates="mixed", dtype=torch.bfloat16),
    Case("scalar", lengths=(17,), dtype=torch.float16),
    Case("scalar", lengths=(2,), key_dim=65, value_dim=49),
]
LARGE = [
    Case("scalar", lengths=(257,), key_dim=48, value_dim=65, chunk_size=None, dtype=torch.bfloat16),
    Case("none", lengths=(100, 63), key_dim=128, value_dim=129, chunk_size=None, dtype=torch.bfloat16),
    Case("fixed", lengths=(100,), key_dim=64, value_dim=64, heads=3, chunk_size=None),
    Case("scalar", lengths=(65,), key_dim=256, value_dim=256, chunk_size=None, dtype=torch.float16),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_interpreted(interpreter: Worker, case: Case) -> None:
    interpreter.run(compare, case)


@pytest.mark.parametrize("chunk_size", [1, 5, 64])
def test_any_chunk_size(interpreter: Worker, chunk_size: int) -> None:
    interpreter.run(compare, Case("scalar", lengths=(6,), chunk_size=chunk_size, documents=((0, 6), (0, 4, 6))))


def blocks_of_16(case: Case) -> None:
    compare(case, kernel=TritonKernel(tiles=small_tiles()))


def test_several_blocks_of_both_dims(interpreter: Worker) -> None:
    interpreter.run(blocks_of_16, Case("scalar", lengths=(20,), key_dim=33, value_dim=20, dtype=torch.bfloat16))


def leaves_of_the_op(gate_shape: tuple[int, ...] | None) -> list[torch.Tensor]:
    q, k, v = (torch.randn(2, 21, 2, 8).transpose(2, 3)[..., :2] for _ in range(3))  # strided inputs
    g = None if gate_shape is None else -torch.rand(gate_shape)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out, final = linear_attention(*leaves, g=g, cu_seqlens=(0, 4, 21), kernel="triton", chunk_size=16)
    # A gradient that is expanded and one that is missing.
    return [*torch.autograd.grad(out.sum(), leaves, retain_graph=True), *torch.autograd.grad(final.sum(), leaves[1:])]


def test_strided_inputs_and_partial_losses(interpreter: Worker) -> None:
    found = interpreter.run(leaves_of_the_op, (8,))
    assert all(x.isfinite().all() for x in found)
    assert all(x.abs().sum() > 0 for x in found)


def outs_with_one_token_changed(token: int) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v = (torch.randn(1, 24, 1, 16) for _ in range(3))
    options = {"g": -torch.rand(1, 24, 1), "cu_seqlens": (0, 18, 24), "kernel": "triton", "chunk_size": 16}
    before, _ = linear_attention(q, k, v, **options)
    k, v = k.clone(), v.clone()
    k[:, token] += 1.0
    v[:, token] -= 1.0
    return before, linear_attention(q, k, v, **options)[0]


@pytest.mark.parametrize(("token", "seen"), [(3, range(3, 18)), (17, range(17, 18)), (18, range(18, 24))])
def test_nothing_leaks(interpreter: Worker, token: int, seen: range) -> None:
    before, after = interpreter.run(outs_with_one_token_changed, token)
    changed = (before != after).any(-1)[0, :, 0].nonzero()[:, 0].tolist()
    assert changed == list(seen)


def gradients_twice(case: Case) -> bool:
    first, second = compare(case), compare(case)
    return all(torch.equal(first[name], second[name]) for name in first)


def test_bitwise_repeatable(interpreter: Worker) -> None:
    assert interpreter.run(gradients_twice, Case("scalar", lengths=(20,)))


@pytest.mark.slow
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_interpreted_large(interpreter: Worker, case: Case) -> None:
    interpreter.run(compare, case)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*CASES, *LARGE], ids=str)
def test_on_a_device(case: Case) -> None:
    compare(case, "cuda")
    compare(replace(case, chunk_size=None), "cuda")


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"dtype": torch.float64}, "float64"),
        ({"key_dim": 257}, "256"),
        ({"chunk_size": 65}, "64"),
        ({"delta": True, "dtype": torch.float32, "key_dim": 129}, "128"),
        ({"device_type": "cpu"}, "cpu"),
    ],
)
def test_refuses(changed: dict[str, object], reason: str) -> None:
    request = LinearRequest(
        device_type="cuda", dtype=torch.bfloat16, gate="scalar", delta=False, key_dim=64, value_dim=65
    )
    assert TritonKernel().unsupported(request) is None
    assert reason in str(TritonKernel().unsupported(replace(request, **changed)))  # type: ignore[arg-type]
