"""Schedules by the names that config uses, with the options that each has."""

from dataclasses import dataclass

from longctx.parallel.schedule import Schedule
from longctx.parallel.schedules.all_gather import AllGather
from longctx.parallel.schedules.ring import (
    CHOICES,
    BackwardName,
    DoubleRing,
    InnermostName,
    Local,
    Ring,
    Ulysses,
    Usp,
    check_choice,
)

SCHEDULES = ("ring", "double_ring", "all_gather", "ulysses", "usp", "local")


@dataclass(frozen=True, kw_only=True)
class ScheduleOptions:
    """Options of schedules; None = the schedule's own choice. One that a schedule does not have is refused.

    Attributes:
        backward: what travels in the backward pass of schedules with a ring: `auto`, `rotate_kv` or `rotate_q`.
        inner: ranks of an inner ring, of `double_ring`; None = ranks per machine.
        ulysses: ranks that share heads, of `usp`; None = all ranks of a machine that can.
        innermost: `ulysses` or `ring`: which axis of `usp` is that of neighbouring ranks.
        gather_heads: KV heads that `all_gather` collects at a time; None = 1.
    """

    backward: str | None = None
    inner: int | None = None
    ulysses: int | None = None
    innermost: str | None = None
    gather_heads: int | None = None


_OPTIONS = {
    "backward": ("ring", "double_ring", "usp"),
    "inner": ("double_ring",),
    "ulysses": ("usp",),
    "innermost": ("usp",),
    "gather_heads": ("all_gather",),
}


def check_schedule(name: str, options: ScheduleOptions, *, also: tuple[str, ...] = ()) -> None:
    """Refuse an unknown name and options that the schedule does not have (ValueError); `also` are other known names."""
    if name not in SCHEDULES:
        raise ValueError(f"attention.schedule={name} is not known; known are {', '.join((*SCHEDULES, *also))}")
    for key, owners in _OPTIONS.items():
        value = getattr(options, key)
        if value is not None and name not in owners:
            raise ValueError(
                f"attention.{key}={value} is an option of attention.schedule={'|'.join(owners)}; given "
                f"attention.schedule={name}. Leave it null"
            )
    for key in CHOICES:
        value = getattr(options, key)
        if value is not None:
            check_choice(key, value)
    for key in ("inner", "ulysses", "gather_heads"):
        value = getattr(options, key)
        if value is not None and value < 1:
            raise ValueError(f"attention.{key} must be >= 1 or null; given {value}")


def resolve_schedule(
    name: str, options: ScheduleOptions | None = None, *, cp: int = 1, heads: int | None = None, per_machine: int = 1
) -> Schedule:
    """Return the schedule called `name`.

    Args:
        options: what is not left to the schedule.
        cp: ranks of the group; for the default of `ulysses`.
        heads: query heads; for the default of `ulysses`.
        per_machine: neighbouring ranks of the group that are on one machine.

    Raises:
        ValueError: an unknown name, or an option that it does not have.
    """
    options = options or ScheduleOptions()
    check_schedule(name, options)
    backward: BackwardName = options.backward or "auto"  # type: ignore[assignment]
    innermost: InnermostName = options.innermost or "ulysses"  # type: ignore[assignment]
    if name == "all_gather":
        return AllGather(gather_heads=options.gather_heads or 1)
    if name == "double_ring":
        return DoubleRing(backward_moves=backward, ranks_per_ring=options.inner or _common(cp, per_machine))
    if name == "ulysses":
        return Ulysses()
    if name == "usp":
        ulysses = options.ulysses or _common(cp, heads or 1, limit=max(per_machine, 2) if cp > 1 else 1)
        return Usp(backward_moves=backward, ulysses=ulysses, innermost=innermost)
    return Local() if name == "local" else Ring(backward_moves=backward)


def _common(*numbers: int, limit: int | None = None) -> int:
    """Return the largest common divisor, no larger than `limit`."""
    smallest = min(numbers) if limit is None else min(*numbers, limit)
    return next(d for d in range(smallest, 0, -1) if all(n % d == 0 for n in numbers))
