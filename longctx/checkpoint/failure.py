"""Turn an error met while writing into one line that says what happened and where."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

from torch.distributed.checkpoint.api import CheckpointException


def explain(error: BaseException) -> str:
    """Return one line: the system's own words and errno name for an OSError, type and first line otherwise."""
    if isinstance(error, CheckpointException):
        return by_rank({rank: explain(cause) for rank, (cause, _) in error.failures.items()})
    if isinstance(error, OSError) and error.errno is not None:
        name = errno.errorcode.get(error.errno, f"errno {error.errno}")
        where = f" in {Path(error.filename).name}" if isinstance(error.filename, str | os.PathLike) else ""
        return f"{error.strerror or os.strerror(error.errno)} ({name}){where}"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def by_rank(reasons: dict[int, str]) -> str:
    """Return one line for the ranks' reasons, each different one told once: "rank 1 and 6 more: No space left ..."."""
    ranks: dict[str, list[int]] = {}
    for rank in sorted(reasons):
        ranks.setdefault(reasons[rank], []).append(rank)
    return "; ".join(
        f"rank {who[0]}{f' and {len(who) - 1} more' if len(who) > 1 else ''}: {reason}" for reason, who in ranks.items()
    )


def portable(error: BaseException, *, file: str) -> OSError | RuntimeError:
    """Return an equivalent that certainly survives pickling to another rank.

    The serializer may hide the system's error behind one of its own ("unexpected pos ..."), so the chain of causes is
    searched for an OSError first. `file` names the file when the error itself does not.
    """
    for link in _chain(error):
        if isinstance(link, OSError) and link.errno is not None:
            name = Path(link.filename).name if isinstance(link.filename, str | os.PathLike) else file
            return OSError(link.errno, link.strerror or os.strerror(link.errno), name)
    return RuntimeError(f"{explain(error)} in {file}")


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or link.__context__
