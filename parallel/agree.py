"""Make the ranks of the default process group agree: on a value of rank 0, on equality, on failure."""

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

Value = TypeVar("Value")


def from_rank_zero(compute: Callable[[], Value]) -> Value:
    """Compute a picklable value on rank 0 and return it on every rank; a ValueError there is raised on every rank."""
    message: list[tuple[str, Value | str]] = [("error", "")]
    if dist.get_rank() == 0:
        try:
            message = [("value", compute())]
        except ValueError as error:
            message = [("error", str(error))]
        except BaseException as error:
            dist.broadcast_object_list([("error", f"rank 0 failed: {error!r}")], src=0)
            raise
    dist.broadcast_object_list(message, src=0)
    kind, value = message[0]
    if kind == "error":
        raise ValueError(value)
    return value  # type: ignore[return-value]


def all_succeed(compute: Callable[[], Value]) -> Value:
    """Run `compute` on every rank; if it raises a ValueError on any, raise the first rank's on all."""
    value, problem = None, None
    try:
        value = compute()
    except ValueError as error:
        problem = str(error)
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    for rank, text in enumerate(problems):
        if text is not None:
            raise ValueError(text if problem == text else f"rank {rank}: {text}")
    return value  # type: ignore[return-value]


def check_equal(digest: str, *, what: str) -> None:
    """Refuse to go on where the ranks' digests differ."""
    digests: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(digests, digest)
    different = [rank for rank, other in enumerate(digests) if other != digests[0]]
    if different:
        raise ValueError(
            f"{what} on rank(s) {different} differs from rank 0's: start every rank with the same arguments"
        )
