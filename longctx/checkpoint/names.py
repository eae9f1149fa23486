"""Names inside a run's `checkpoints` directory (Megatron's, so that its users and tools find their way).

checkpoints/iter_0000040/                        a published checkpoint of step 40
checkpoints/iter_0000040.writing/                being written, or left behind by a killed process
checkpoints/iter_0000040.replaced/               the older checkpoint of a step that is just being replaced
checkpoints/iter_0000040.removing/               being deleted
checkpoints/latest_checkpointed_iteration.txt    the step of the newest published checkpoint, without padding
"""

from __future__ import annotations

import re
from pathlib import Path

TRACKER = "latest_checkpointed_iteration.txt"
METADATA = ".metadata"  # DCP's own name for the file that it writes last
EXTRA = "extra.json"
WRITING, REPLACED, REMOVING = ".writing", ".replaced", ".removing"

_PUBLISHED = re.compile(r"iter_(\d{7,})")


def checkpoints_directory(run_dir: Path) -> Path:
    """Return where a run keeps its checkpoints."""
    return run_dir / "checkpoints"


def name_of(step: int) -> str:
    """Return the directory name of a step's checkpoint."""
    return f"iter_{step:07d}"


def step_of(name: str) -> int | None:
    """Return the step that a published checkpoint's directory name states, None for any other name."""
    match = _PUBLISHED.fullmatch(name)
    return int(match.group(1)) if match else None


def with_suffix(folder: Path, suffix: str) -> list[Path]:
    """List the directories `iter_NNNNNNN<suffix>` in a checkpoints directory, oldest step first."""
    if not folder.is_dir():
        return []
    found = [
        path
        for path in folder.iterdir()
        if path.name.endswith(suffix) and step_of(path.name.removesuffix(suffix)) is not None and path.is_dir()
    ]
    return sorted(found, key=lambda path: int(step_of(path.name.removesuffix(suffix)) or 0))


def published_steps(folder: Path) -> list[int]:
    """List the steps that have a published directory (complete or not), oldest first."""
    return [int(path.name.removeprefix("iter_")) for path in with_suffix(folder, "")]


def read_tracker(folder: Path) -> int | str | None:
    """Read the tracker file: the step, the text itself if it isn't a number, None if there is no file."""
    try:
        text = (folder / TRACKER).read_text(encoding="utf-8", errors="replace").strip()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return int(text) if re.fullmatch(r"\d{1,18}", text, flags=re.ASCII) else text
