"""Blocks of the kernels of sparse attention, by architecture, bits of the inputs and class of head dims.

Every line has been compiled for its architecture (`benchmarks/compile_report.py`): nothing spills for 16-bit inputs.
Two kernels for float32, whose products no matrix unit makes, spill 8 bytes per thread.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from longctx.kernels.softmax.triton.tile_table import Blocks
from longctx.kernels.triton_common.tile_table import FALLBACK, head_dim_class


@dataclass(frozen=True, slots=True)
class Entry:
    """Blocks of the two kernels.

    Attributes:
        forward: its block of keys is a part of a tile of keys.
        backward: its block of keys is the largest tile of keys.
        turns: blocks of queries that one program of the backward pass goes through. With more there is less to sum, but
            longer to wait for a tile that everybody sees.
        precision: of matrix products: Triton's `input_precision`.
    """

    forward: Blocks
    backward: Blocks
    turns: int = 16
    precision: str = "ieee"


@dataclass(frozen=True)
class SparseTable:
    """One architecture's entries: (bits of the inputs, class of head dims) -> entry."""

    arch: str
    entries: Mapping[tuple[int, int], Entry]

    def entry(self, dtype: torch.dtype, *dims: int) -> Entry:
        """Return the entry for inputs of a dtype and head dims."""
        return self.entries[8 * dtype.itemsize, head_dim_class(*dims)]


_32 = {
    (32, 64): Entry(Blocks(32, 16, 8, 1), Blocks(32, 32, 8, 1)),
    (32, 128): Entry(Blocks(16, 16, 8, 1), Blocks(16, 32, 8, 1)),
    (32, 256): Entry(Blocks(16, 16, 8, 1), Blocks(16, 16, 8, 1)),
}
_SM_80 = {
    (16, 64): Entry(Blocks(64, 64, 4, 2), Blocks(32, 64, 4, 1)),
    (16, 128): Entry(Blocks(64, 64, 8, 2), Blocks(32, 64, 8, 2)),
    (16, 256): Entry(Blocks(64, 32, 8, 2), Blocks(32, 32, 8, 1)),
}
_SM_90 = {
    (16, 64): Entry(Blocks(64, 64, 4, 2), Blocks(32, 64, 4, 2)),
    (16, 128): Entry(Blocks(64, 64, 4, 2), Blocks(32, 64, 8, 2)),
    (16, 256): Entry(Blocks(64, 64, 8, 2), Blocks(32, 32, 8, 2)),
}
TABLES = {"sm_80": SparseTable("sm_80", {**_32, **_SM_80}), "sm_90": SparseTable("sm_90", {**_32, **_SM_90})}
# Others, such as sm_86, sm_89 and sm_120, may have no more than 99 KiB of shared memory per program.
TABLES[FALLBACK] = SparseTable(FALLBACK, {**_32, **_SM_80})


def table_of(arch: str) -> SparseTable:
    """Return the table of an architecture, or the fallback's."""
    return TABLES.get(arch, TABLES[FALLBACK])
