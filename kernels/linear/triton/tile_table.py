"""Tiles of the kernels of linear attention: `plain` (one decay per token and head, or none), `diagonal`, `delta`.

Every line has been compiled for its architecture: nothing spills (`benchmarks/compile_report.py`).
"""

from longctx.kernels.triton_common.tile_table import FALLBACK, Entry, Tile, TileTable

_PLAIN = ("outer", "out", "dq", "dk", "dv")


def _same(names: tuple[str, ...], tile: Tile, **other: Tile) -> dict[str, Tile]:
    return {**dict.fromkeys(names, tile), **other}


def _delta16(size: int) -> dict[str, Tile]:
    """Tiles of the delta rule for 16-bit inputs; scans take all of the key dims at once."""
    large = size == 256
    scan, wide = Tile(size, 32, 8 if large else 4, 1), Tile(size, 16 if large else 32, 8, 1)
    return {
        "scores": Tile(64, 64, 4, 1),
        "scores_diagonal": Tile(32, 64, 8, 1),
        "factors": Tile(64, 64, 4, 1),
        "scan": scan,
        "scan_wide": wide,
        "output": Tile(64, 64, 4, 2),
        "scan_backward": scan,
        "scan_backward_wide": wide,
        "factors_gradient": Tile(64, 64, 4, 1),
        "factors_gradient_wide": Tile(64, 32, 8, 1),
        "solve_backward": Tile(64, 64, 8, 1),
        "scores_backward": Tile(32, 64, 8, 1),
        "scores_backward_diagonal": Tile(16, 64, 8, 1),
    }


def _delta32(size: int) -> dict[str, Tile]:
    """Tiles of the delta rule for 32-bit inputs; with key dims above 128 scans do not fit in registers."""
    tiles = _same(("output", "scores", "factors", "factors_gradient", "factors_gradient_wide"), Tile(32, 32, 4, 1))
    tiles |= {"scores_diagonal": Tile(32, 32, 4, 1), "solve_backward": Tile(32, 32, 4, 1)}
    tiles |= {"scores_backward": Tile(16, 32, 4, 1), "scores_backward_diagonal": Tile(16, 32, 4, 1)}
    scans = ("scan", "scan_wide", "scan_backward", "scan_backward_wide")
    return {**tiles, **_same(scans, Tile(size, 16, 8, 1))}


_SCAN = {"scan": Tile(64, 64, 4, 1), "scan_backward": Tile(64, 64, 4, 1)}
_PLAIN16 = _same(_PLAIN, Tile(64, 64, 4, 2), dq=Tile(32, 64, 4, 2))
_PLAIN32 = _same(_PLAIN, Tile(32, 32, 4, 1))
_DIAGONAL16 = _same(_PLAIN, Tile(32, 64, 4, 1), dk=Tile(16, 64, 4, 1))
_DIAGONAL32 = _same(_PLAIN, Tile(32, 32, 8, 1), out=Tile(32, 32, 4, 1), dv=Tile(32, 32, 4, 1))
_ENTRIES = {
    **{("plain", 16, size): Entry(64, "ieee", {**_PLAIN16, **_SCAN}) for size in (64, 128, 256)},
    **{("diagonal", 16, size): Entry(32, "ieee", {**_DIAGONAL16, **_SCAN}) for size in (64, 128, 256)},
    **{("diagonal", 32, size): Entry(32, "ieee", {**_DIAGONAL32, **_SCAN}) for size in (64, 128, 256)},
    **{("plain", 32, size): Entry(32, "ieee", {**_PLAIN32, **_SCAN}) for size in (64, 128, 256)},
    # `bf16x3` is for what stays float32 with 16-bit inputs: inverses in chunks, and maps of segments. `tf32x3` keeps 22
    # of float32's 24 digits on the matrix unit; without it, scans spill.
    **{("delta", 16, size): Entry(32, "bf16x3", _delta16(size)) for size in (64, 128, 256)},
    **{("delta", 32, size): Entry(16, "tf32x3", _delta32(size)) for size in (64, 128)},
}

# Triton's interpreter does not know `bf16x3`.
_ANYWHERE = {("delta", 16, size): Entry(32, "tf32x3", _delta16(size)) for size in (64, 128, 256)}
# Where chunks of 64 with a decay per key dim, or of the delta rule, do not spill.
_SM_90 = {
    **{
        ("diagonal", 16, size): Entry(64, "ieee", {**_same(_PLAIN, Tile(32, 64, 8, 1)), **_SCAN})
        for size in (64, 128, 256)
    },
    **{("delta", 16, size): Entry(64, "bf16x3", _delta16(size)) for size in (64, 128)},
}
TABLES = {"sm_80": TileTable("sm_80", _ENTRIES), "sm_90": TileTable("sm_90", {**_ENTRIES, **_SM_90})}
TABLES[FALLBACK] = TileTable(FALLBACK, {**_ENTRIES, **_ANYWHERE})


def table_of(arch: str) -> TileTable:
    """Return the table of an architecture, or the fallback's."""
    return TABLES.get(arch, TABLES[FALLBACK])
