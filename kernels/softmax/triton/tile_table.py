"""Blocks of the kernels of softmax attention, by architecture, bits of the inputs and class of head dims.

Every line has been compiled for its architecture (`benchmarks/compile_report.py`): nothing spills for 16-bit inputs,
nor for float32 up to head dim 64. Above, its products, which no matrix unit makes, spill up to 280 bytes per thread.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from longctx.kernels.triton_common.tile_table import FALLBACK, head_dim_class


@dataclass(frozen=True, slots=True)
class Blocks:
    """How one kernel is launched.

    Attributes:
        queries, keys: of a block; powers of two of at least 16.
        warps, stages: Triton's `num_warps` and `num_stages`.
        programs: for each multiprocessor: a persistent grid, whose programs take one item after another; 0 = one
            program for each item, which the device starts in the order of the items.
    """

    queries: int
    keys: int
    warps: int
    stages: int
    programs: int = 0


@dataclass(frozen=True, slots=True)
class Entry:
    """Blocks of the three kernels.

    Attributes:
        dkv_tight: of dk and dv where `dkv` would spill: with a softcap, or head dims that are no powers of two.
        precision: of matrix products: Triton's `input_precision`.
    """

    forward: Blocks
    dq: Blocks
    dkv: Blocks
    dkv_tight: Blocks | None = None
    precision: str = "ieee"

    def key_gradients(self, *, softcap: bool, head_dims: tuple[int, int]) -> Blocks:
        """Return the blocks of the kernel of dk and dv."""
        tight = softcap or any(size & (size - 1) for size in head_dims)
        return self.dkv_tight if tight and self.dkv_tight is not None else self.dkv


@dataclass(frozen=True)
class SoftmaxTable:
    """One architecture's entries: (bits of the inputs, class of head dims) -> entry."""

    arch: str
    entries: Mapping[tuple[int, int], Entry]

    def entry(self, dtype: torch.dtype, *dims: int) -> Entry:
        """Return the entry for inputs of a dtype and head dims."""
        return self.entries[8 * dtype.itemsize, head_dim_class(*dims)]


_32 = {
    (32, 64): Entry(Blocks(32, 16, 8, 1), Blocks(64, 32, 8, 1), Blocks(32, 32, 8, 1)),
    (32, 128): Entry(Blocks(16, 16, 8, 1), Blocks(32, 16, 8, 1), Blocks(32, 32, 8, 1)),
    (32, 256): Entry(Blocks(16, 16, 8, 1), Blocks(16, 16, 8, 1), Blocks(16, 16, 8, 1)),
}
_SM_80 = {
    (16, 64): Entry(Blocks(128, 64, 8, 3), Blocks(128, 64, 8, 2), Blocks(32, 128, 8, 2)),
    (16, 128): Entry(Blocks(64, 64, 8, 2), Blocks(128, 32, 8, 2), Blocks(64, 64, 8, 2)),
    (16, 256): Entry(Blocks(64, 16, 8, 2), Blocks(64, 32, 8, 2), Blocks(32, 32, 8, 2)),
}
_SM_90 = {
    (16, 64): Entry(Blocks(128, 128, 8, 3), Blocks(128, 64, 8, 3), Blocks(64, 128, 8, 3), Blocks(64, 128, 8, 2)),
    (16, 128): Entry(Blocks(128, 64, 8, 3), Blocks(128, 64, 8, 2), Blocks(64, 64, 8, 2), Blocks(32, 64, 8, 2)),
    (16, 256): Entry(Blocks(64, 64, 8, 2), Blocks(64, 32, 8, 2), Blocks(64, 32, 8, 2)),
}
TABLES = {"sm_80": SoftmaxTable("sm_80", {**_32, **_SM_80}), "sm_90": SoftmaxTable("sm_90", {**_32, **_SM_90})}
# Others, such as sm_86, sm_89 and sm_120, may have no more than 99 KiB of shared memory per program.
_SMALL = {(16, 256): replace(_SM_80[16, 256], dq=Blocks(32, 32, 8, 1))}
TABLES[FALLBACK] = SoftmaxTable(FALLBACK, {**_32, **_SM_80, **_SMALL})


def table_of(arch: str) -> SoftmaxTable:
    """Return the table of an architecture, or the fallback's."""
    return TABLES.get(arch, TABLES[FALLBACK])
