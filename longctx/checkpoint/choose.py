"""Decide which checkpoint a run continues from. Runs on one rank; nothing here communicates or writes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from longctx.checkpoint.integrity import problem
from longctx.checkpoint.names import (
    METADATA,
    REPLACED,
    TRACKER,
    WRITING,
    checkpoints_directory,
    name_of,
    published_steps,
    read_tracker,
    step_of,
    with_suffix,
)

Report = Callable[[str], None]


def choose(run_dir: Path, *, resume: str, report: Report) -> Path | None:
    """Return the checkpoint that `checkpoint.resume` asks for, None for a fresh start.

    Raises:
        ValueError: a path was given and is missing, incomplete, or holds no complete checkpoint.
    """
    if resume == "never":
        return None
    if resume == "auto":
        return newest(checkpoints_directory(run_dir), report=report)
    path = Path(resume).expanduser().absolute()
    own = checkpoints_directory(run_dir)
    step = read_tracker(own)
    if isinstance(step, int) and not (own / name_of(step)).is_relative_to(path):
        # Easily overlooked when a job is restarted with its first command line.
        report(f"this run has a checkpoint of its own at step {step}; checkpoint.resume={resume} leaves it aside")
    hint = "need 'auto', 'never', or the path of a checkpoint directory (.../iter_0000040) or of a run directory"
    if not path.is_dir():
        raise ValueError(f"checkpoint.resume is {resume!r}: there is no such directory; {hint}")
    names_one = step_of(path.name.removesuffix(WRITING).removesuffix(REPLACED)) is not None
    if names_one or (path / METADATA).exists():
        if reason := problem(path):
            raise ValueError(f"checkpoint.resume is {resume!r}: that checkpoint is not complete: {reason}")
        return path
    inner = checkpoints_directory(path)
    found = newest(inner if inner.is_dir() else path, report=report)
    if found is None:
        raise ValueError(f"checkpoint.resume is {resume!r}: no complete checkpoint in there; {hint}")
    return found


def newest(folder: Path, *, report: Report) -> Path | None:
    """Return the newest complete checkpoint of a checkpoints directory, None if there is none.

    The tracker file decides what "newest" means, since directories with higher steps may be left from a run that was
    taken back to an earlier step; they come last. Everything that is passed over is reported with the reason.
    """
    for path in with_suffix(folder, WRITING):
        report(f"checkpoint {path.name} is an unfinished save: skipped")
    steps = published_steps(folder)
    tracked = read_tracker(folder)
    if isinstance(tracked, str):
        report(f"{TRACKER} holds {tracked[:40]!r} instead of a step: taking the newest complete checkpoint")
    if tracked is None and steps:
        report(f"{TRACKER} is missing: taking the newest complete checkpoint")
    limit = tracked if isinstance(tracked, int) else max(steps, default=0)
    if isinstance(tracked, int) and tracked not in steps:
        report(f"{TRACKER} names step {tracked}, but there is no {name_of(tracked)}: trying the next older one")
    later = [step for step in steps if step > limit]
    order = [step for step in reversed(steps) if step <= limit] + later[::-1]
    for step in order:
        path = folder / name_of(step)
        if reason := problem(path):
            report(f"checkpoint {path.name} is not complete: {reason}: skipped")
            continue
        if later and step <= limit:
            report(
                f"{', '.join(name_of(other) for other in later)} passed over: {TRACKER} names step {limit}; "
                "to use another one set checkpoint.resume to its path"
            )
        return path
    return None
