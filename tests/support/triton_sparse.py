"""Small blocks for the Triton kernels of sparse attention, so that short sequences take several."""

from longctx.kernels.block_sparse.triton.tile_table import Entry, SparseTable
from longctx.kernels.softmax.triton.tile_table import Blocks

_SMALL = Entry(Blocks(16, 16, 4, 1), Blocks(16, 32, 4, 1), turns=2)


def small_blocks() -> SparseTable:
    """Return a table of blocks of 16 and 32, whose programs of the backward pass take two blocks of queries."""
    return SparseTable("small", {(bits, size): _SMALL for bits in (16, 32) for size in (64, 128, 256)})
