"""File operations that survive a crash at any instant."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def sync_directory(path: Path) -> None:
    """Make the entries of a directory (new files, renames) durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_synced(path: Path, text: str) -> None:
    """Write a UTF-8 text file and wait until its content is on disk (its directory entry is the caller's)."""
    with path.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def remove_tree(path: Path, *, through: Path) -> None:
    """Delete a directory by way of the name `through`, so that no half-deleted directory ever has the name `path`."""
    if through.exists():
        shutil.rmtree(through)
    path.rename(through)
    shutil.rmtree(through)
