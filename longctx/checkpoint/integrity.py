"""Tell a complete checkpoint from a half-written or damaged one, without reading its tensors."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata

from longctx.checkpoint.names import EXTRA, METADATA, REMOVING, REPLACED, WRITING


def read_extra(path: Path) -> dict[str, Any]:
    """Read what a checkpoint holds besides tensors; raise ValueError if it is missing or unreadable."""
    try:
        extra = json.loads((path / EXTRA).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"checkpoint {path}: {EXTRA} is missing") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"checkpoint {path}: {EXTRA} cannot be read: {error}") from error
    if not isinstance(extra, dict):
        raise ValueError(f"checkpoint {path}: {EXTRA} holds a {type(extra).__name__}, need an object")
    return extra


def read_metadata(path: Path) -> Metadata:
    """Read DCP's index of a checkpoint; raise ValueError if it is missing or unreadable.

    The index is a pickle: read only checkpoints that you trust as much as the code that you run.
    """
    try:
        return FileSystemReader(path).read_metadata()
    except FileNotFoundError:
        raise ValueError(f"{METADATA} is missing") from None
    # A damaged pickle may raise nearly anything.
    except (
        OSError,
        pickle.UnpicklingError,
        EOFError,
        LookupError,
        AttributeError,
        ImportError,
        TypeError,
        ValueError,
        MemoryError,
        AssertionError,
        RecursionError,
        OverflowError,
    ) as error:
        raise ValueError(f"{METADATA} cannot be read ({type(error).__name__}: {error})") from error


def stored_keys(path: Path) -> frozenset[str]:
    """Return the flattened names ("model.embed.weight") of everything that a checkpoint stores."""
    return frozenset(stored_shapes(path))


def stored_shapes(path: Path) -> dict[str, tuple[int, ...] | None]:
    """Return the shape of every tensor that a checkpoint stores, None for other objects, by flattened name."""
    return {name: _shape(stored) for name, stored in read_metadata(path).state_dict_metadata.items()}


def _shape(stored: TensorStorageMetadata | BytesStorageMetadata) -> tuple[int, ...] | None:
    return tuple(stored.size) if isinstance(stored, TensorStorageMetadata) else None


def problem(path: Path) -> str | None:
    """Say in words why a directory is not a complete checkpoint under its final name; None if it is one."""
    if not path.is_dir():
        return "it is not a directory"
    if path.name.endswith((WRITING, REPLACED, REMOVING)):
        return "it is an unfinished save or removal"
    return content_problem(path)


def content_problem(path: Path) -> str | None:
    """Say in words what a checkpoint directory of any name lacks; None if nothing.

    Checked: the index, `extra.json`, and that every data file is at least as long as the index says.
    """
    try:
        metadata = read_metadata(path)
        read_extra(path)
    except ValueError as error:
        return str(error).removeprefix(f"checkpoint {path}: ")
    needed: dict[str, int] = {}
    for info in (metadata.storage_data or {}).values():
        needed[info.relative_path] = max(needed.get(info.relative_path, 0), info.offset + info.length)
    for name, size in sorted(needed.items()):
        try:
            # Opening, unlike stat alone, makes network file systems look again at a file that another host wrote.
            with (path / name).open("rb") as stream:
                actual = os.fstat(stream.fileno()).st_size
        except OSError as error:
            return f"{name} cannot be opened ({error.strerror})"
        if actual < size:
            return f"{name} has {actual} bytes, need {size}"
    return None
