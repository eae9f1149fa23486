"""Blocks of consecutive positions as a layout of their own: which blocks a rank owns, where it owns whole ones."""

from functools import lru_cache

import torch

from longctx.parallel.layout import Layout


@lru_cache(maxsize=64)
def block_layout(layout: Layout, *, block_size: int, total: int) -> Layout:
    """Return the layout of the `ceil(total / block_size)` blocks of a sequence, in the order of the ranks' tokens.

    Raises:
        ValueError: the layout cuts a block: some rank has a part of it only, or has its tokens apart.
    """
    if layout.cp == 1:
        return Layout("contiguous", 1)
    layout.check_total(total)
    if block_size == 1:
        return layout
    whole = total % block_size == 0 and all(
        segment.stride == 1 and segment.start % block_size == 0 and segment.count % block_size == 0
        for rank in range(layout.cp)
        for segment in layout.segments(rank, total)
    )
    if not whole:
        instead = _instead(layout, block_size, total)
        raise ValueError(f"{layout.describe()} cuts blocks of {block_size} tokens: {instead}")
    blocks = Layout(layout.name, layout.cp, max(layout.width // block_size, 1) if layout.name == "striped" else 1)
    for rank in range(layout.cp):
        first = layout.positions(rank, total)[::block_size] // block_size
        assert torch.equal(blocks.positions(rank, total // block_size), first), (layout, block_size, total)
    return blocks


def _instead(layout: Layout, block_size: int, total: int) -> str:
    """Say which lengths and layouts keep blocks whole."""
    told = []
    for name, parts in (("contiguous", layout.cp), ("zigzag", 2 * layout.cp), ("striped", layout.cp)):
        unit = parts * block_size
        below = total // unit * unit
        near = f"{below or unit}" + (f" or {below + unit}" if below else "")
        what = f"attention.layout={name}"
        if name == "striped":
            what += f" with attention.width a multiple of {block_size}"
        fits = total % unit == 0
        told.append(what if fits else f"{what} and data.seq_len a multiple of {unit} such as {near}")
    return "use " + ", or ".join(told) + ", or another block_size"
