"""Which layers a run may continue a checkpoint with: softmax attention, dense or sparse, may become other such.

What a query looks at may change from one step to the next: projections, and so all that they have learnt, are the same
in layers of all these kinds. What has weights of another shape, linear attention, may not, nor may what the projections
are made for: RoPE, and a gate on the outputs.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from longctx.checkpoint.compare import compare_models
from longctx.checkpoint.partial import Loaded
from longctx.mixers.config import MixersConfig
from longctx.mixers.layers import Layers
from longctx.mixers.pattern import LINEAR_KINDS, SOFTMAX_KINDS, SPARSE_KINDS, describe_layers

SAME = ("rope", "gate")  # settings that a layer has whatever its queries see
_CHANGEABLE = (*SOFTMAX_KINDS, *SPARSE_KINDS)
_MODEL, _STATE = "model.", "optimizer.state."  # how names begin in a checkpoint
_OWN = re.compile(r"blocks\.(\d+)\.(attention\.sparse\..+)")  # a parameter of what selects


@dataclass(frozen=True)
class LayerChange:
    """How a run's layers differ from those of its checkpoint.

    Attributes:
        words: what is another, such as `mixers.moba.topk was 3, is 4`.
        layers: numbers of the layers whose parameters of the selection may be others.
    """

    words: tuple[str, ...]
    layers: frozenset[int]

    def may_begin(self, name: str) -> bool:
        """Tell whether a checkpoint may lack a parameter, or its optimizer state, by its flattened name."""
        match = _OWN.search(name)
        return match is not None and int(match[1]) in self.layers


def compare_layers(
    saved: dict[str, Any], kinds: Sequence[str], layers: Layers, *, heads: int, head_dim: int
) -> LayerChange:
    """Return what a checkpoint's layers have other than those of a run.

    Args:
        saved: `Layers.arithmetic` of the checkpoint, through JSON.
        kinds: of its layers.
        layers: of the run.
        heads, head_dim: of the run's model.

    Raises:
        ValueError: a linear layer that is another, or RoPE or a gate that a layer had otherwise; names the key.
    """
    current = layers.arithmetic(heads, head_dim)
    pairs = list(zip(kinds, layers.kinds, strict=True))
    if any(old != new and not {old, new}.issubset(_CHANGEABLE) for old, new in pairs):
        compare_models(_layers(saved), _layers(current), prefix="layer stack")
        raise AssertionError((kinds, layers.kinds))
    compare_models(_linear(saved), _linear(current), prefix="layer stack")
    for index, (old, new) in enumerate(pairs):
        if new in _CHANGEABLE:
            _check_surroundings(index, (old, _settings(saved, old)), (new, _settings(current, new)))
    words = []
    if _layers(saved) != _layers(current):  # windows instead of everything are told with the mask
        words.append(f"the layers were {describe_layers(kinds)}, are {describe_layers(layers.kinds)}")
    same = [kind for kind in layers.sparse_kinds if kind in kinds]
    changes = {kind: _changes(kind, _settings(saved, kind), _settings(current, kind)) for kind in same}
    words += [each for told in changes.values() for each in told]
    others = {index for index, (old, new) in enumerate(pairs) if old != new or changes.get(new)}
    return LayerChange(tuple(words), frozenset(others))


def describe_loaded(loaded: Loaded) -> list[str]:
    """Say in lines which parameters of selections begin anew, and which of the checkpoint are not used."""
    weights = {name.removeprefix(_MODEL) for name in loaded.left if name.startswith(_MODEL)}
    state = {name.removeprefix(_STATE).rpartition(".")[0] for name in loaded.left if name.startswith(_STATE)}
    unused = {name.removeprefix(_MODEL) for name in loaded.unused if name.startswith(_MODEL) and _OWN.search(name)}
    lines = []
    if weights:
        lines.append(f"begin with initial values, which the checkpoint does not have: {_parameters(weights)}")
    if state - weights:
        lines.append(
            f"begin with a new state of the optimizer, as they were not trained: {_parameters(state - weights)}"
        )
    if unused:
        lines.append(f"of the checkpoint, no layer uses: {_parameters(unused)}")
    return lines


def _parameters(names: Iterable[str]) -> str:
    """Return names of parameters of selections in words: `attention.sparse.router.weight (blocks 0-2, 4)`."""
    found: dict[str, set[int]] = defaultdict(set)
    for name in names:
        match = _OWN.fullmatch(name)
        assert match is not None, name
        found[match[2]].add(int(match[1]))
    return ", ".join(f"{leaf} (block{'s' * (len(found[leaf]) > 1)} {_ranges(found[leaf])})" for leaf in sorted(found))


def _check_surroundings(index: int, old: tuple[str, dict[str, Any]], new: tuple[str, dict[str, Any]]) -> None:
    for key in SAME:
        before, now = (str(settings[key]).lower() for _, settings in (old, new))
        if before != now:
            raise ValueError(
                f"checkpoint of another layer stack: layer {index} has mixers.{old[0]}.{key}={before} in the "
                f"checkpoint, mixers.{new[0]}.{key}={now} in the config, and a layer keeps its {key} whatever its "
                f"kind: set mixers.{new[0]}.{key}={before}, or checkpoint.resume=never or another run directory"
            )


def _changes(kind: str, old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    keys = [key for key in new if key not in SAME and old[key] != new[key]]
    return [f"mixers.{kind}.{key} was {old[key]}, is {new[key]}" for key in keys]


def _settings(arithmetic: dict[str, Any], kind: str) -> dict[str, Any]:
    """Return the settings of a kind of softmax attention that numbers depend on; those not told are the defaults."""
    default = {key: value for key, value in vars(MixersConfig().softmax(kind)).items() if key != "kernel"}
    return {key: _plain(arithmetic.get(f"mixers.{kind}.{key}", value)) for key, value in default.items()}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value  # as JSON has it


def _layers(arithmetic: dict[str, Any]) -> dict[str, Any]:
    return {"attention.layers": arithmetic["attention.layers"]}


def _linear(arithmetic: dict[str, Any]) -> dict[str, Any]:
    return {
        key: value
        for key, value in arithmetic.items()
        if key.startswith("mixers.") and key.split(".")[1] in LINEAR_KINDS
    }


def _ranges(numbers: Iterable[int]) -> str:
    """Return `0-2, 4` for 0, 1, 2, 4."""
    runs = [[n for _, n in run] for _, run in groupby(enumerate(sorted(numbers)), key=lambda each: each[1] - each[0])]
    return ", ".join(f"{run[0]}" if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
