"""Small blocks for the Triton kernels of softmax attention, so that short sequences take several."""

from longctx.kernels.softmax.triton.tile_table import Blocks, Entry, SoftmaxTable

_SMALL = Entry(Blocks(32, 16, 4, 1), Blocks(16, 32, 4, 1), Blocks(16, 32, 4, 1))
# A persistent grid of one program, and of two.
_PERSISTENT = Entry(Blocks(16, 16, 4, 1, 1), Blocks(16, 16, 4, 1, 1), Blocks(16, 32, 4, 1, 2))


def small_blocks(*, persistent: bool = False) -> SoftmaxTable:
    """Return a table of blocks of 16 and 32."""
    entry = _PERSISTENT if persistent else _SMALL
    return SoftmaxTable("small", {(bits, size): entry for bits in (16, 32) for size in (64, 128, 256)})
