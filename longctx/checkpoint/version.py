"""Say which code wrote a checkpoint."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path

import longctx


@cache
def code_version() -> str:
    """Return the package's version and, from a git checkout, its commit: "0.1.0+1f2e3d4c5b6a" or "...-dirty".

    "-dirty" means that tracked files differ from the commit. Without git, or installed from a wheel: "0.1.0+unknown".
    """
    folder = Path(longctx.__file__).resolve().parent
    try:
        # An installed package may lie inside somebody else's checkout: only a tracked file proves that it is ours.
        _git(folder, "ls-files", "--error-unmatch", "__init__.py")
        commit = _git(folder, "rev-parse", "--short=12", "HEAD")
        dirty = _git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return f"{longctx.__version__}+unknown"
    return f"{longctx.__version__}+{commit}{'-dirty' if dirty else ''}"


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
