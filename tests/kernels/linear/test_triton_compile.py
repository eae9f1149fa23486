"""Every configuration of the tile tables, compiled for its architecture by Triton's own compiler: no GPU is needed."""

from dataclasses import replace

import pytest

from longctx.kernels.linear.triton.offline import ARCHS, GATES, Configuration, configurations, launches
from longctx.kernels.triton_common.offline import SHARED_LIMITS, compile_launch
from tests.support.triton_worker import Worker, compiler

__all__ = ["compiler"]

EVERYTHING = list(configurations())
# One of each family: what differs most between architectures.
USUAL = [c for c in EVERYTHING if c.head_dim == 128 and c.dtype.itemsize == 2 and c.gate == GATES[c.family][-1]]


def faults(configuration: Configuration, kernels: tuple[str, ...] | None = None) -> tuple[list[str], list[str]]:
    """Compile a configuration's kernels; return which, and what is wrong with them."""
    names, wrong = [], []
    for launch in launches(configuration):
        name = launch.kernel.__name__.removesuffix("_kernel")
        if kernels is not None and (name not in kernels or name in names):
            continue
        names.append(name)
        binary = compile_launch(launch, configuration.arch)
        if binary.stack or binary.local:
            wrong.append(f"{name} spills {binary.stack} + {binary.local} bytes with {binary.registers} registers")
        if binary.shared > SHARED_LIMITS[configuration.arch]:
            wrong.append(f"{name} wants {binary.shared} bytes of shared memory")
        # Products of float32 at full precision are none of the matrix unit's.
        if binary.dots and configuration.dtype.itemsize == 2 and not binary.matrix_unit:
            wrong.append(f"{name} has {binary.dots} products and none on the matrix unit")
    return names, wrong


@pytest.mark.parametrize("configuration", USUAL, ids=str)
def test_compiles(compiler: Worker, configuration: Configuration) -> None:
    kernels = {"plain": ("dk", "out"), "diagonal": ("dq",), "delta": ("scores",)}[configuration.family]
    names, wrong = compiler.run(faults, configuration, kernels)
    assert sorted(names) == sorted(kernels)
    assert not wrong


@pytest.mark.exhaustive
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("configuration", EVERYTHING, ids=str)
def test_all_compiles(compiler: Worker, configuration: Configuration) -> None:
    names, wrong = compiler.run(faults, configuration)
    assert len(names) >= 7
    assert not wrong


def test_tables_serve_the_same_families() -> None:
    assert (
        len({frozenset((c.family, c.dtype, c.head_dim) for c in EVERYTHING if c.arch == arch) for arch in ARCHS}) == 1
    )
    assert {c.family for c in EVERYTHING} == set(GATES)


def spilling() -> list[str]:
    """Ask for far more than there are registers."""
    configuration = Configuration("sm_80", "plain", "scalar", EVERYTHING[0].dtype, 128)
    launch = next(x for x in launches(configuration) if x.kernel.__name__ == "dk_kernel")
    binary = compile_launch(replace(launch, warps=1), "sm_80")
    return ["spills"] if binary.stack or binary.local else []


def test_a_spill_is_seen(compiler: Worker) -> None:
    assert compiler.run(spilling) == ["spills"]
