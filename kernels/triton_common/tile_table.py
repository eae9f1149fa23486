"""Tile sizes by architecture: small tables that are committed and never searched for when a program starts.

A family of kernels has one `TileTable` per architecture. What a device has no table for takes the fallback's.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

FALLBACK = "fallback"


@dataclass(frozen=True, slots=True)
class Tile:
    """How one kernel is launched.

    Attributes:
        key: block over the key dim (a power of two), or the most there is to take at once.
        value: block over the value dim, likewise.
        warps, stages: Triton's `num_warps` and `num_stages`.
    """

    key: int
    value: int
    warps: int
    stages: int


@dataclass(frozen=True, slots=True)
class Entry:
    """What one head-dim class of one kind of inputs takes.

    Attributes:
        chunk: tokens of a chunk.
        precision: of matrix products: Triton's `input_precision`, for float32 inputs `ieee` or `tf32x3`.
        tiles: kernel's name -> its tile.
    """

    chunk: int
    precision: str
    tiles: Mapping[str, Tile]


@dataclass(frozen=True)
class TileTable:
    """One architecture's entries.

    Attributes:
        arch: `sm_80`, `sm_90` or `fallback`.
        entries: (family, bits of the inputs, head-dim class) -> entry.
    """

    arch: str
    entries: Mapping[tuple[str, int, int], Entry]

    def entry(self, family: str, dtype: torch.dtype, *dims: int) -> Entry:
        """Return the entry of a family for inputs of a dtype and head dims."""
        return self.entries[family, 8 * dtype.itemsize, head_dim_class(*dims)]


def head_dim_class(*dims: int) -> int:
    """Return the class of head dims: 64, 128 or 256, the least that holds the largest of them."""
    return next((size for size in (64, 128, 256) if max(dims) <= size), 256)


def arch_of(device: torch.device) -> str:
    """Return a device's architecture as tables name it."""
    if device.type != "cuda":
        return FALLBACK
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def block(dim: int, most: int) -> int:
    """Return the block over a dim: a power of two of at least 16, as matrix units want it, and at most `most`."""
    return min(most, max(16, 1 << (dim - 1).bit_length()))
