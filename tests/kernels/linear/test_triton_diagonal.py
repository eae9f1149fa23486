"""Triton's kernels with one decay per key dim (GLA): on the CPU, and on a device."""

import pytest
import torch

from longctx.kernels.linear.triton_kernel import TritonKernel
from tests.support.triton_linear import Case, compare, small_tiles
from tests.support.triton_worker import Worker, interpreter

__all__ = ["interpreter"]

PACKED = ((0, 1, 20, 21, 25), (0, 16, 24, 25))
CASES = [
    Case("diagonal", lengths=(21,), heads=2),
    Case("diagonal", lengths=(17,), gates="zero"),
    Case("diagonal", lengths=(17,), gates="mixed"),
    Case("diagonal", lengths=(20, 1, 4), documents=PACKED, dtype=torch.bfloat16, gates="mixed"),
    Case("diagonal", lengths=(2,), key_dim=65, value_dim=49),
]
LARGE = [
    Case("diagonal", lengths=(100,), key_dim=48, value_dim=65, chunk_size=None, dtype=torch.bfloat16),
    Case("diagonal", lengths=(65, 63), key_dim=64, value_dim=64, chunk_size=None),
    Case("diagonal", lengths=(65,), key_dim=128, value_dim=128, chunk_size=None, gates="mixed", dtype=torch.float16),
    Case("diagonal", lengths=(33,), key_dim=256, value_dim=256, chunk_size=None, dtype=torch.bfloat16),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_interpreted(interpreter: Worker, case: Case) -> None:
    interpreter.run(compare, case)


def blocks_of_16(case: Case) -> None:
    compare(case, kernel=TritonKernel(tiles=small_tiles()))


def test_several_blocks_of_both_dims(interpreter: Worker) -> None:
    interpreter.run(blocks_of_16, Case("diagonal", lengths=(18,), key_dim=20, value_dim=17, dtype=torch.bfloat16))


@pytest.mark.slow
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_interpreted_large(interpreter: Worker, case: Case) -> None:
    interpreter.run(compare, case)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*CASES, *LARGE], ids=str)
def test_on_a_device(case: Case) -> None:
    compare(case, "cuda")
