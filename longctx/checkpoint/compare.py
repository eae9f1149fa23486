"""Refuse a checkpoint of another model before any tensor is touched."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_ABSENT = object()


def compare_models(saved: dict[str, Any], current: dict[str, Any], *, prefix: str = "model") -> None:
    """Raise ValueError naming the first field that differs between two descriptions, with both values.

    Args:
        saved: the description from the checkpoint's extra (went through JSON, so tuples are lists there).
        current: the same of this run.
        prefix: what is described: a configuration key that goes before the fields, or a name of several words.
    """
    # A key of the configuration is said in full; the keys below any other name are in full already.
    for name, old, new in _differences(saved, current, "" if " " in prefix else prefix):
        raise ValueError(
            f"checkpoint of another {prefix}: {name} is {_words(old)} in the checkpoint, {_words(new)} in the config; "
            f"use the checkpoint's {prefix}, or set checkpoint.resume=never or another run directory"
        )


def _differences(saved: Any, current: Any, name: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(saved, dict) and isinstance(current, dict):
        # The config's order first, as users know it; what only the checkpoint has comes last.
        for key in [*current, *(key for key in saved if key not in current)]:
            yield from _differences(
                saved.get(key, _ABSENT), current.get(key, _ABSENT), f"{name}.{key}" if name else key
            )
    elif isinstance(saved, list | tuple) and isinstance(current, list | tuple):
        if list(saved) != list(current):
            yield name, saved, current
    elif type(saved) is bool or type(current) is bool:
        if saved is not current:
            yield name, saved, current
    elif saved != current:
        yield name, saved, current


def _words(value: Any) -> str:
    return "not set" if value is _ABSENT else repr(value)
