"""Every line of the tables of softmax attention, compiled for its architecture by Triton's compiler, without a GPU."""

import pytest
import torch

from longctx.kernels.softmax.triton.offline import ARCHS, Configuration, configurations, launches
from longctx.kernels.triton_common.offline import SHARED_LIMITS, compile_launch
from tests.support.triton_worker import Worker, compiler

__all__ = ["compiler"]

EVERYTHING = list(configurations())
KERNELS = ["forward_kernel", "query_gradient_kernel", "key_gradients_kernel"]
# A backward kernel takes seconds to compile.
USUAL = [(c, KERNELS[:1]) for c in EVERYTHING if c.head_dim == c.v_head_dim == 128 and c.dtype.itemsize == 2]
USUAL = [(c, names) for c, names in USUAL if not c.softcap]
USUAL += [(Configuration("sm_90", torch.bfloat16, 128, 128, False), KERNELS[2:])]
# What no matrix unit multiplies.
MAY_SPILL = 300


def faults(configuration: Configuration, kernels: list[str]) -> tuple[list[str], list[str]]:
    """Compile a configuration's kernels; return which, and what is wrong with them."""
    names, wrong = [], []
    for launch in launches(configuration):
        name = launch.kernel.__name__
        if name not in kernels:
            continue
        names.append(name)
        binary = compile_launch(launch, configuration.arch)
        narrow = configuration.dtype.itemsize == 2
        allowed = 0 if narrow or configuration.head_dim <= 64 else MAY_SPILL
        if binary.stack + binary.local > allowed:
            wrong.append(f"{name} spills {binary.stack} + {binary.local} bytes with {binary.registers} registers")
        if binary.shared > SHARED_LIMITS[configuration.arch]:
            wrong.append(f"{name} wants {binary.shared} bytes of shared memory")
        # wgmma takes 64 rows at a time.
        if narrow and not binary.matrix_unit:
            wrong.append(f"{name} has {binary.dots} products on {binary.matrix_unit or 'no matrix unit'}")
    return names, wrong


@pytest.mark.parametrize(("configuration", "kernels"), USUAL, ids=lambda x: str(x) if not isinstance(x, list) else x[0])
def test_compiles(compiler: Worker, configuration: Configuration, kernels: list[str]) -> None:
    names, wrong = compiler.run(faults, configuration, kernels)
    assert names == kernels
    assert not wrong


def usual_units() -> set[str]:
    configuration = Configuration("sm_90", torch.bfloat16, 128, 128, False)
    return {compile_launch(launch, "sm_90").matrix_unit for launch in launches(configuration)}


def test_the_usual_configuration_uses_hoppers_unit(compiler: Worker) -> None:
    assert compiler.run(usual_units) == {"wgmma"}


def shared_of_fallback() -> dict[str, int]:
    """Compile the fallback's lines for a GPU with little shared memory."""
    found = {}
    for size in (128, 256):
        for launch in launches(Configuration("fallback", torch.bfloat16, size, size, True)):
            found[f"{launch.kernel.__name__} {size}"] = compile_launch(launch, "sm_86").shared
    return found


@pytest.mark.slow
def test_the_fallback_fits_small_devices(compiler: Worker) -> None:
    found = compiler.run(shared_of_fallback)
    assert max(found.values()) <= SHARED_LIMITS["sm_86"], found


@pytest.mark.exhaustive
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("configuration", EVERYTHING, ids=str)
def test_all_compiles(compiler: Worker, configuration: Configuration) -> None:
    names, wrong = compiler.run(faults, configuration, KERNELS)
    assert names == KERNELS
    assert not wrong


def test_tables_have_every_class_of_both_widths() -> None:
    found = {arch: {(c.dtype, c.head_dim) for c in EVERYTHING if c.arch == arch} for arch in ARCHS}
    for dtype in (torch.bfloat16, torch.float32):
        assert {(dtype, size) for size in (64, 96, 128, 192, 256)} <= found["sm_80"]
    assert found["sm_80"] == found["sm_90"]
