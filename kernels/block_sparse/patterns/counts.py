"""Sums over the queries of a document, in closed form: exact integers for any length."""


def triangle(length: int) -> int:
    """Return the sum of `i + 1` over `i < length`: causal pairs."""
    return length * (length + 1) // 2


def last(length: int, window: int) -> int:
    """Return the sum of `min(i + 1, window)`: pairs of a sliding window."""
    return triangle(length) - triangle(max(length - window, 0))


def whole_before(length: int, stride: int) -> int:
    """Return the sum of `i // stride`: the blocks that lie before each query's own one."""
    blocks, rest = divmod(length, stride)
    return stride * triangle(blocks - 1) + rest * blocks


def in_block(length: int, stride: int) -> int:
    """Return the sum of `i % stride + 1`: pairs inside of blocks."""
    blocks, rest = divmod(length, stride)
    return blocks * triangle(stride) + triangle(rest)


def rounded(total: int, count: int) -> int:
    """Return `total / count`, rounded, halves up."""
    return (2 * total + count) // (2 * count)
