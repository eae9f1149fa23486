"""A state dict by flattened names, as torch DCP stores it, and what of it a checkpoint has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Loaded:
    """How a checkpoint and what was asked for differ, in flattened names.

    Attributes:
        left: asked for, but absent or of another shape: as they were before.
        unused: in the checkpoint, and not asked for.
    """

    left: tuple[str, ...]
    unused: tuple[str, ...]


@dataclass(frozen=True)
class Leaf:
    """A value in a nest of dicts and lists, and where it is."""

    holder: Any
    key: Any

    @property
    def value(self) -> Any:
        """Return the value."""
        return self.holder[self.key]


def leaves(tree: dict[str, Any]) -> dict[str, Leaf]:
    """Return what a nested state dict holds by flattened name: "optimizer.state.embedding.weight.step"."""
    return dict(_walk(tree, ""))


def lacking(
    wanted: dict[str, Leaf], stored: dict[str, tuple[int, ...] | None], may_lack: Callable[[str], bool]
) -> tuple[str, ...]:
    """Return the names that may be, and are, absent from what is stored or have another shape there."""
    return tuple(
        name
        for name, leaf in wanted.items()
        if may_lack(name)
        and (name not in stored or (isinstance(leaf.value, Tensor) and tuple(leaf.value.shape) != stored[name]))
    )


def _walk(node: Any, prefix: str) -> Iterator[tuple[str, Leaf]]:
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        nested = isinstance(value, list) and any(isinstance(each, dict | list | Tensor) for each in value)
        if nested or isinstance(value, dict):
            yield from _walk(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", Leaf(node, key)
