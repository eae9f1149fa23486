"""Every line of the tables of sparse attention, compiled for its architecture by Triton's compiler, without a GPU."""

import pytest
import torch

from longctx.kernels.block_sparse.triton.offline import ARCHS, Configuration, configurations, launches
from longctx.kernels.block_sparse.triton.tile_table import FALLBACK
from longctx.kernels.triton_common.offline import SHARED_LIMITS, compile_launch
from tests.support.triton_worker import Worker, compiler

__all__ = ["compiler"]

EVERYTHING = list(configurations())
USUAL = [Configuration(arch, torch.bfloat16, size, size) for arch in ARCHS for size in (64, 128)]
KERNELS = {"forward_kernel", "backward_kernel", "merge_kernel", "sum_kernel"}
PRODUCTS = {"forward_kernel": 2, "backward_kernel": 5}
# What no matrix unit multiplies.
MAY_SPILL = 8


def faults(configuration: Configuration) -> tuple[set[str], list[str]]:
    """Compile a configuration's kernels; return which, and what is wrong with them."""
    names, wrong = set(), []
    for launch in launches(configuration):
        name, masked = launch.kernel.__name__, launch.arguments.get("MASKED")
        names.add(name)
        what = f"{name}{' masked' if masked else ''}"
        binary = compile_launch(launch, configuration.arch)
        narrow = configuration.dtype.itemsize == 2
        allowed = 0 if narrow else MAY_SPILL
        if binary.stack + binary.local > allowed:
            wrong.append(f"{what} spills {binary.stack} + {binary.local} bytes with {binary.registers} registers")
        if binary.shared > SHARED_LIMITS[configuration.arch]:
            wrong.append(f"{what} wants {binary.shared} bytes of shared memory")
        if binary.dots < PRODUCTS.get(name, 0) or (narrow and binary.dots and not binary.matrix_unit):
            wrong.append(f"{what} has {binary.dots} products on {binary.matrix_unit or 'no matrix unit'}")
    return names, wrong


@pytest.mark.parametrize("configuration", USUAL, ids=str)
def test_compiles(compiler: Worker, configuration: Configuration) -> None:
    names, wrong = compiler.run(faults, configuration)
    assert names == KERNELS
    assert not wrong


def usual_units() -> set[str]:
    configuration = Configuration("sm_90", torch.bfloat16, 128, 128)
    return {compile_launch(launch, "sm_90").matrix_unit for launch in launches(configuration)}


def test_the_usual_configuration_uses_hoppers_unit(compiler: Worker) -> None:
    assert compiler.run(usual_units) == {"wgmma", ""}  # nothing is multiplied where pairs are merged and summed


def shared_of_fallback() -> dict[str, int]:
    """Compile the fallback's lines for a GPU with little shared memory."""
    found = {}
    for size in (64, 128, 256):
        for block_size in (64, 512):
            for launch in launches(Configuration(FALLBACK, torch.bfloat16, size, size, block_size=block_size)):
                found[f"{launch.kernel.__name__} {size} {block_size}"] = compile_launch(launch, "sm_86").shared
    return found


@pytest.mark.slow
def test_the_fallback_fits_small_devices(compiler: Worker) -> None:
    found = compiler.run(shared_of_fallback)
    assert max(found.values()) <= SHARED_LIMITS["sm_86"], found


@pytest.mark.exhaustive
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("configuration", EVERYTHING, ids=str)
def test_all_compiles(compiler: Worker, configuration: Configuration) -> None:
    names, wrong = compiler.run(faults, configuration)
    assert names == (KERNELS - {"merge_kernel"} if configuration.weights == "sum" else KERNELS)
    assert not wrong


def test_tables_have_every_class_of_both_widths() -> None:
    found = {arch: {(c.dtype, c.head_dim) for c in EVERYTHING if c.arch == arch} for arch in ARCHS}
    for dtype in (torch.bfloat16, torch.float32):
        assert {(dtype, size) for size in (64, 96, 128, 192, 256)} <= found["sm_80"]
    assert found["sm_80"] == found["sm_90"]
