"""How many (query, key) pairs attention to blocks computes: integers, no tensors."""

from collections.abc import Iterator

from longctx.kernels.block_sparse.patterns.counts import triangle


def block_rows(begin: int, length: int, block_size: int) -> Iterator[tuple[int, int]]:
    """Yield, for each block that the document `begin ... begin + length - 1` touches, how many of its tokens lie in it
    and how many blocks of the document lie before it."""
    first = begin // block_size
    for block in range(first, -(-(begin + length) // block_size)):
        rows = min(begin + length, (block + 1) * block_size) - max(begin, block * block_size)
        yield rows, block - first


def routed_pairs(begin: int, length: int, *, block_size: int, others: int) -> int:
    """Return the pairs of queries that see their own block and the best `others` before it, each counted as a whole."""
    return sum(
        triangle(rows) + min(others, before) * block_size * rows
        for rows, before in block_rows(begin, length, block_size)
    )
