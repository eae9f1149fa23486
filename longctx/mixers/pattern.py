"""Which mixer each layer has: `attention.layers` as a pattern over the depth, or as a list.

A pattern is a sum of kinds with counts, `"lightning*7 + full*1"`; a count of 1 may be left out. It is repeated until
the model is as deep as `model.num_layers`, which must be a multiple of its length.
"""

import re
from collections.abc import Sequence
from itertools import groupby

SOFTMAX_KINDS = ("full", "window")
SPARSE_KINDS = (
    "moba",
    "nsa",
    "seer",
    "landmark",
    "mosa",
    "routing",
    "sla",
    "sparse_strided",
    "sparse_fixed",
    "s2",
    "neighborhood",
    "vertical_slash",
)
LINEAR_KINDS = (
    "linear",
    "lightning",
    "transnormer",
    "retention",
    "simple_gla",
    "gla",
    "regla",
    "deltanet",
    "gdn",
    "kda",
)
KINDS = (*SOFTMAX_KINDS, *SPARSE_KINDS, *LINEAR_KINDS)
LEAST_DEPTH = 2  # of a model whose depth follows from the pattern

_TERM = re.compile(r"\s*(\w+)\s*(?:\*\s*(\d{1,4})\s*)?")


def parse_layers(layers: object, *, num_layers: int) -> tuple[str, ...]:
    """Return the kind of each of `num_layers` layers.

    Args:
        layers: a pattern, or a list with a kind for each layer.

    Raises:
        ValueError: an unknown kind, what is no pattern, or a depth that it does not fill.
    """
    once = parse_round(layers)
    if isinstance(layers, str):
        if num_layers % len(once):
            below = num_layers // len(once) * len(once)
            near = f"{below} or {below + len(once)}" if below else f"{len(once)}"
            raise ValueError(
                f"attention.layers={layers!r} has {len(once)} layers, of which model.num_layers={num_layers} is no "
                f"multiple: set model.num_layers to one such as {near}, or name the kind of every layer in a list"
            )
        return once * (num_layers // len(once))
    if len(once) != num_layers:
        raise ValueError(
            f"attention.layers names {len(once)} layers, model.num_layers={num_layers}: name one kind per layer, or "
            "give a pattern to repeat such as 'gdn*3 + full'"
        )
    return once


def parse_round(layers: object) -> tuple[str, ...]:
    """Return the kinds of one round of a pattern, or of a list."""
    if isinstance(layers, str):
        kinds = _parse(layers)
    elif isinstance(layers, list | tuple) and layers and all(isinstance(kind, str) for kind in layers):
        kinds = tuple(layers)
    else:
        raise ValueError(
            f"attention.layers must be a pattern such as 'lightning*7 + full*1', a list of kinds, or null; given "
            f"{layers!r}"
        )
    unknown = next((kind for kind in kinds if kind not in KINDS), None)
    if unknown is not None:
        raise ValueError(f"attention.layers: {unknown!r} is no kind of layer; known are {', '.join(KINDS)}")
    return kinds


def depth(layers: object) -> int:
    """Return how many layers a model has whose `model.num_layers` is null: whole rounds of the pattern, at least 2."""
    if layers is None:
        return LEAST_DEPTH
    once = len(parse_round(layers))
    return once * -(-LEAST_DEPTH // once) if isinstance(layers, str) else once


def describe_layers(kinds: Sequence[str]) -> str:
    """Return kinds in words: `(gdn*3 + full) x 2`."""
    rounds = next(n for n in range(len(kinds), 0, -1) if len(kinds) % n == 0 and _repeats(kinds, len(kinds) // n))
    once = kinds[: len(kinds) // rounds]
    runs = [(kind, len(list(run))) for kind, run in groupby(once)]
    words = " + ".join(kind if count == 1 else f"{kind}*{count}" for kind, count in runs)
    if rounds == 1:
        return words
    return f"{words}*{rounds}" if len(once) == 1 else f"({words}) x {rounds}"


def _repeats(kinds: Sequence[str], period: int) -> bool:
    return all(kind == kinds[index % period] for index, kind in enumerate(kinds))


def _parse(pattern: str) -> tuple[str, ...]:
    kinds: list[str] = []
    for term in pattern.split("+"):
        match = _TERM.fullmatch(term)
        count = int(match[2] or 1) if match else 0
        if match is None or not count:
            raise ValueError(
                f"attention.layers={pattern!r}: cannot read {term.strip()!r}; write kinds with counts >= 1, such as "
                "'lightning*7 + full*1'"
            )
        kinds += [match[1]] * count
    return tuple(kinds)
