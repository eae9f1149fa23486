"""Schedules by the names that config uses."""

from longctx.parallel.schedule import Schedule
from longctx.parallel.schedules.local import Local
from longctx.parallel.schedules.ring import Ring

SCHEDULES: dict[str, Schedule] = {schedule.name: schedule for schedule in (Ring(), Local())}


def resolve_schedule(name: str) -> Schedule:
    """Return the schedule called `name`, or raise a ValueError that lists the known ones."""
    if name not in SCHEDULES:
        raise ValueError(f"attention.schedule={name} is not known; known are {', '.join(SCHEDULES)}")
    return SCHEDULES[name]
