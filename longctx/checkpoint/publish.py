"""Give a finished checkpoint its name, and remove what is no longer needed. Runs on one rank.

At every instant the tracker file and the directories describe either the state before or the state after: directories
get their final name by one rename, the tracker by another.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from longctx.checkpoint.durable import remove_tree, sync_directory, write_synced
from longctx.checkpoint.failure import explain
from longctx.checkpoint.integrity import problem
from longctx.checkpoint.names import (
    REMOVING,
    REPLACED,
    TRACKER,
    WRITING,
    name_of,
    published_steps,
    with_suffix,
)


def publish(folder: Path, *, step: int) -> Path:
    """Turn `iter_<step>.writing`, whose files are all on disk, into the newest checkpoint; return its path.

    A checkpoint of the same step that exists already is replaced. On OSError everything is put back and the error
    raised.
    """
    final = folder / name_of(step)
    writing, aside = folder / f"{final.name}{WRITING}", folder / f"{final.name}{REPLACED}"
    sync_directory(writing)
    # The tracker's new content first: a full disk shows here, while nothing has been renamed yet.
    tracker = folder / f"{TRACKER}.new"
    write_synced(tracker, f"{step}\n")
    replacing = final.exists()
    try:
        if replacing:
            # A crash between the two renames leaves `.replaced` alone: put_back() then restores it.
            final.rename(aside)
        writing.rename(final)
        sync_directory(folder)
        tracker.replace(folder / TRACKER)
        sync_directory(folder)
    except OSError:
        if not writing.exists() and final.exists():
            final.rename(writing)
        if aside.exists() and not final.exists():
            aside.rename(final)
        tracker.unlink(missing_ok=True)
        raise
    return final


def put_back(folder: Path) -> list[str]:
    """Restore checkpoints that a crash caught in the middle of their replacement; return messages."""
    messages = []
    for aside in with_suffix(folder, REPLACED):
        final = folder / aside.name.removesuffix(REPLACED)
        if not final.exists():
            aside.rename(final)
            sync_directory(folder)
            messages.append(f"checkpoint {final.name}: its replacement was interrupted, the older one is back")
    return messages


def remove_leftovers(folder: Path) -> list[str]:
    """Delete what interrupted saves and removals left; return messages. Only while no rank is writing."""
    messages = put_back(folder)
    for path in with_suffix(folder, WRITING):
        shutil.rmtree(path)
        messages.append(f"removed {path.name}, left by an interrupted save")
    for suffix in (REPLACED, REMOVING):
        for path in with_suffix(folder, suffix):
            shutil.rmtree(path)
    (folder / f"{TRACKER}.new").unlink(missing_ok=True)
    return messages


def prune(folder: Path, *, newest: int, keep_last: int) -> list[str]:
    """Delete checkpoints older than the `keep_last` newest complete ones up to step `newest`; return messages.

    Directories of later steps (left from before the run was taken back to an earlier one) are neither counted nor
    touched. An error stops the removal and is told, never raised: the new checkpoint is safe already.
    """
    complete = 0
    messages = []
    for step in reversed([step for step in published_steps(folder) if step <= newest]):
        path = folder / name_of(step)
        try:
            if complete >= keep_last:
                remove_tree(path, through=folder / f"{path.name}{REMOVING}")
            elif problem(path) is None:
                complete += 1
        except OSError as error:
            messages.append(f"could not remove the old checkpoint {path.name}: {explain(error)}")
            break
    try:
        for path in with_suffix(folder, REPLACED):
            shutil.rmtree(path)
    except OSError as error:
        messages.append(f"could not remove {path.name}: {explain(error)}")
    return messages
