"""Count what the Triton kernels of softmax attention visit: pairs of blocks by rows' intervals, and tile by tile.

    python benchmarks/blocks.py --total 131072 --cp 8 --block 64

For each layout and distribution of document lengths: visible pairs of one rank in all hops, and how many pairs its
blocks hold, as multiples of the visible ones. "By tiles" cuts every tile into blocks of its own, as a kernel would that
takes a list of tiles; "by intervals" is what is done. Integers only, no device.
"""

import argparse

from _softmax_problems import packed

from longctx.kernels.mask import causal, documents
from longctx.kernels.positions import Tile
from longctx.kernels.softmax.triton.intervals import intervals_of
from longctx.kernels.softmax.triton.ranges import ranges_of
from longctx.parallel.layout import Layout
from longctx.parallel.plan import plan
from longctx.parallel.registry import resolve_schedule


def main() -> None:
    """Count and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--total", type=int, default=131_072)
    parser.add_argument("--cp", type=int, default=8)
    parser.add_argument("--block", type=int, default=64)
    options = parser.parse_args()
    layouts = {
        "contiguous": Layout("contiguous", options.cp),
        "zigzag": Layout("zigzag", options.cp),
        "striped": Layout("striped", options.cp),
        "striped, width 64": Layout("striped", options.cp, 64),
    }
    print("| documents | layout | tiles | by tiles | by intervals |")
    print("|---|---|---|---|---|")
    for name, bounds in lengths(options.total).items():
        for label, layout in layouts.items():
            mask = causal() & documents(bounds)
            mine = plan(layout, (mask,), resolve_schedule("ring"), rank=options.cp // 2, total=options.total)
            lists = [each.tiles for hop in mine.hops for each in hop.lists]
            tokens, size = mine.tokens, options.block
            visible = sum(tile.pairs for tiles in lists for tile in tiles)
            ours = sum(visited(tiles, tokens, size) for tiles in lists)
            alone = sum(visited([moved(tile)], tile.q_count, size) for tiles in lists for tile in tiles)
            counts = f"{sum(map(len, lists))} | {alone * size**2 / visible:.2f}x | {ours * size**2 / visible:.2f}x"
            print(f"| {name} | {label} | {counts} |", flush=True)


def visited(tiles: list[Tile] | tuple[Tile, ...], tokens: int, size: int) -> int:
    """Return the pairs of blocks of a list of tiles."""
    return int(ranges_of(intervals_of(tiles), rows=tokens, height=size, width=size).cost.sum())


def moved(tile: Tile) -> Tile:
    """Return a tile that begins at the first row and column, so that its blocks do."""
    return Tile(0, tile.q_count, 0, tile.k_count, tile.lo, tile.hi)


def lengths(total: int) -> dict[str, tuple[int, ...]]:
    """Return document bounds: one document, and exponential lengths of three means."""
    return {"one": (0, total)} | {f"mean {mean}": packed(total, mean=mean) for mean in (4096, 512, 64)}


if __name__ == "__main__":
    main()
