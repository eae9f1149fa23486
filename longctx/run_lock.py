"""One run per run directory: a second one would write into the first one's checkpoints and metrics."""

import fcntl
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import IO


def lock_run_directory(run_dir: Path, *, report: Callable[[str], None]) -> IO[str]:
    """Lock `run_dir` for this process and return the lock's file; the lock ends when it is closed or the process ends.

    Raises:
        ValueError: another live process holds the lock (its host and pid are named), or the directory cannot be
        written.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        file = (run_dir / "run.lock").open("a+")
    except OSError as error:
        raise ValueError(f"the run directory {run_dir} cannot be written ({error}); set run_dir") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise ValueError(
            f"the run directory {run_dir} is in use by {holder}: wait for it, stop it, or set another run_dir"
        ) from None
    except OSError as error:
        report(f"note: {run_dir} cannot be locked ({error}): make sure that no other run uses it")
        return file
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file
