"""From hydra groups and command-line overrides to frozen dataclasses: the one place that knows OmegaConf.

Groups are composed by hydra's compose API, merged once into the structured `Config` below (which refuses unknown keys
and wrong types), converted to plain dataclasses, and checked. Nothing below this module sees a DictConfig.
"""

import dataclasses
import difflib
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from longctx.attention_config import AttentionConfig
from longctx.checkpoint.config import CheckpointConfig
from longctx.data.config import DataConfig
from longctx.engines.engine import EngineConfig
from longctx.metrics.config import LoggerConfig
from longctx.mixers.config import MixersConfig
from longctx.mixers.layers import Layers
from longctx.mixers.pattern import depth
from longctx.mixers.sparse.base import Sizes
from longctx.model import ModelConfig
from longctx.optim import OptimConfig, check_schedule
from longctx.parallel.mesh import ParallelConfig

CONFIGS = Path(__file__).resolve().parent / "configs"


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loop.

    Attributes:
        steps: optimizer steps of the whole run; a resumed run stops at the same number.
        global_batch: sequences per optimizer step, over all ranks.
        micro_batch: sequences per forward and backward; the accumulation steps follow.
        eval_every: steps between two held-out evaluations; 0 = only at the end.
        eval_samples: held-out sequences per evaluation; 0 = none.
        seed: of the initial weights.
    """

    steps: int = 100
    global_batch: int = 2
    micro_batch: int = 1
    eval_every: int = 0
    eval_samples: int = 8
    seed: int = 1234

    def validate(self) -> None:
        """Refuse impossible numbers."""
        least = {"steps": 1, "global_batch": 1, "micro_batch": 1, "eval_every": 0, "eval_samples": 0, "seed": 0}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f"train.{name} must be >= {bound}; given {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that a run depends on."""

    run_dir: str = "runs/default"
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    mixers: MixersConfig = field(default_factory=MixersConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def validate(self) -> None:
        """Check every part and what concerns two of them, before anything is built."""
        parts = (self.attention, self.model, self.data, self.parallel, self.engine, self.optim, self.checkpoint)
        for part in (*parts, self.logger, self.train):
            part.validate()
        self.attention.check_heads(self.model.num_heads)
        softmax = (*self.layers.softmax_kinds, *self.layers.sparse_kinds)
        if softmax:
            self.model.validate_attention(rope=any(getattr(self.mixers, kind).rope for kind in softmax))
        self.mixers.validate(self.layers.used, head_dim=self.model.head_size)
        self._validate_sparse()
        prefix = self.attention.prefix
        if prefix is not None and prefix >= self.data.seq_len:
            raise ValueError(
                f"attention.prefix={prefix} leaves nothing to predict in sequences of data.seq_len="
                f"{self.data.seq_len}; lower it, or raise data.seq_len"
            )
        check_schedule(self.optim, total_steps=self.train.steps)
        if not self.run_dir.strip():
            raise ValueError("run_dir is empty; give the directory for checkpoints and logs")

    def _validate_sparse(self) -> None:
        model = self.model
        if self.layers.sparse and not self.layers.masked:
            self.attention.refuse_dense()
        if self.layers.sparse and not any(self.mixers.sparse_kind(kind).selects for kind in self.layers.sparse_kinds):
            self.attention.refuse_moves(self.layers.sparse_kinds)
        for kind in self.layers.sparse_kinds:
            settings = self.mixers.sparse_kind(kind)
            if model.sink_logits and not settings.takes_sinks:
                raise ValueError(
                    f"model.sink_logits=true cannot be honoured by layers of kind {kind}, which have more than one "
                    "softmax: set it to false"
                )
            # What only building it finds out, such as heads that do not fit.
            sizes = Sizes(model.dim, model.num_heads, model.num_kv_heads, model.head_size)
            try:
                with torch.device("meta"):
                    settings.make(sizes)
            except ValueError as error:
                raise ValueError(f"layers of kind {kind} cannot be built: mixers.{kind}: {error}") from error

    @property
    def layers(self) -> Layers:
        """Return what mixes tokens in each layer."""
        return Layers(
            kinds=self.attention.kinds(self.model.num_layers), mixers=self.mixers, max_positions=self.data.seq_len
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the resolved config as plain JSON-able values."""
        return dataclasses.asdict(self)

    def digest(self) -> str:
        """Return a hash that is equal on two ranks iff their configs are."""
        return hashlib.sha256(json.dumps(self.as_dict(), sort_keys=True).encode()).hexdigest()

    def to_yaml(self) -> str:
        """Return the resolved config as YAML."""
        return OmegaConf.to_yaml(OmegaConf.create(self.as_dict()))


def load_config(overrides: Sequence[str]) -> Config:
    """Compose `configs/train.yaml` with hydra overrides and check the result.

    Raises:
        ValueError: an unknown key or choice, a wrong type, or an impossible combination; names the key and what is
        known.
    """
    schema = OmegaConf.structured(Config)
    _check_overrides(overrides, schema)
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            raw = compose("train", overrides=list(overrides))
        if raw.model.num_layers is None:
            layers = raw.attention.layers
            raw.model.num_layers = depth(OmegaConf.to_object(layers) if OmegaConf.is_list(layers) else layers)
        # Frozen dataclasses make read-only nodes, which a merge cannot fill.
        _set_writable(schema)
        config = OmegaConf.to_object(OmegaConf.merge(schema, raw))
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(_words(error)) from error
    assert isinstance(config, Config)
    config.validate()
    if not config.layers.softmax:  # what is predicted for `auto` is softmax attention
        config = dataclasses.replace(config, attention=config.attention.without_auto())
    return config


def _check_overrides(overrides: Sequence[str], schema: DictConfig) -> None:
    """Refuse keys that nothing reads, with the closest known ones: hydra itself would take `+new=1` and say little."""
    keys = _leaf_keys(schema)
    groups = config_groups()
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_][\w.]*", key):
            raise ValueError(f"cannot read the argument {override!r}: need key=value, such as data.seq_len=16384")
        if key in groups and value not in groups[key] and not value.startswith("{"):
            raise ValueError(f"{override} is not known; known are {', '.join(groups[key])}")
        if key in groups or key in keys or key in _inner_keys(keys):
            continue
        by_leaf = [known for known in keys if known.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
        close = by_leaf or difflib.get_close_matches(key, [*keys, *groups], n=3, cutoff=0.6)
        known = ", ".join(sorted({*groups, *(k.partition(".")[0] for k in keys)}))
        hint = f"did you mean {' or '.join(close)}?" if close else f"top-level keys and groups: {known}"
        raise ValueError(f"unknown key {key!r} in {override!r}; {hint}")


def config_groups() -> dict[str, list[str]]:
    """Return the config groups and their choices."""
    folders = sorted(path for path in CONFIGS.iterdir() if path.is_dir() and not path.name.startswith((".", "_")))
    return {folder.name: sorted(path.stem for path in folder.glob("*.yaml")) for folder in folders}


def _leaf_keys(schema: DictConfig) -> list[str]:
    def walk(node: Any, prefix: str) -> list[str]:
        if not OmegaConf.is_dict(node):
            return [prefix]
        return [key for name in node for key in walk(node._get_node(name), f"{prefix}.{name}" if prefix else str(name))]

    return walk(schema, "")


def _inner_keys(keys: Sequence[str]) -> set[str]:
    """Return the dotted prefixes of all leaves: whole groups may be given as `group.part={...}`."""
    return {key.rsplit(".", depth)[0] for key in keys for depth in range(1, key.count(".") + 1)}


def _set_writable(node: Any) -> None:
    if OmegaConf.is_config(node):
        OmegaConf.set_readonly(node, False)
    if OmegaConf.is_dict(node):
        for name in node:
            _set_writable(node._get_node(name))
    elif node is not None and not OmegaConf.is_config(node):
        node._set_flag("readonly", False)


def _words(error: BaseException) -> str:
    """Return the useful half of hydra's message, which is often that of its cause."""
    parts = [str(error).strip()]
    if error.__cause__ is not None and str(error.__cause__).strip() not in parts[0]:
        parts.append(str(error.__cause__).strip())
    lines = [line.strip() for part in parts for line in part.splitlines()]
    words = [line for line in lines if line and not line.startswith(("reference_type", "object_type"))]
    return "; ".join(line.replace("full_key: ", "the key is ") for line in words)
