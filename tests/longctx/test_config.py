"""From overrides to frozen dataclasses: what is accepted, and what every mistake is told."""

import dataclasses
from pathlib import Path

import pytest
import torch
import yaml

from longctx.config import CONFIGS, Config, config_groups, load_config
from longctx.mixers.config import MixersConfig
from longctx.mixers.linear import LinearMixer
from longctx.mixers.pattern import LINEAR_KINDS, depth
from longctx.model import Decoder, SelfAttention
from longctx.setup import check_kernel, check_world


def test_the_default_run():
    config = load_config([])
    assert config.attention.layout == "striped" and config.attention.schedule == "ring"
    assert config.data.seq_len >= 8192 and config.data.source == "stdlib"
    assert config.checkpoint.resume == "auto"
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.train.steps = 3  # type: ignore[misc]


@pytest.fixture(scope="module")
def default():
    return load_config([])


@pytest.mark.parametrize("name", config_groups()["attention"])
def test_attention_changes_the_strategy_and_nothing_else(default, name):
    """But for the depth of a model that has none of its own: that of the pattern of layers."""
    config = load_config([f"attention={name}"])
    model = dataclasses.replace(default.model, num_layers=depth(config.attention.layers))
    assert dataclasses.replace(config, attention=default.attention) == dataclasses.replace(default, model=model)


# Those of attention are composed above.
OTHER_CHOICES = [(g, c) for g, choices in config_groups().items() if g != "attention" for c in choices]


@pytest.mark.parametrize(
    "name",
    ["lightning", "transnormer", "gla", "deltanet", "gdn", "kda", "minimax_7_1", "gdn_3_1", "window_full_3_1"],
)
def test_presets_of_layers_build_and_run_on_one_rank_and_on_two(name):
    config = load_config([f"attention={name}", "model.vocab_size=257"])
    with torch.device("meta"):
        model = Decoder(config.model, config.layers)
    built = [type(block.attention) for block in model.blocks]
    assert built == [LinearMixer if kind in LINEAR_KINDS else SelfAttention for kind in config.layers.kinds]
    for world_size in (1, 2):
        check_world(config, world_size=world_size, per_machine=world_size)
    assert set(check_kernel(config, device_type="cpu").values()) <= {"torch", "blocked"}


@pytest.mark.parametrize(("group", "choice"), OTHER_CHOICES)
def test_every_choice_of_every_other_group_composes(group, choice, tmp_path):
    needs = {"folder": tmp_path, "txt": tmp_path, "jsonl": tmp_path / "a.jsonl", "bin": tmp_path / "a"}
    extra = [f"data.path={needs[choice]}"] if group == "data" and choice in needs else []
    load_config([f"{group}={choice}", *extra])


def test_config_files_name_every_key_of_their_group():
    """A reader of configs/ sees every option; a file with another key would be refused when it is used."""
    schema = {field.name: field.default_factory for field in dataclasses.fields(Config) if field.name != "run_dir"}
    for group, choices in config_groups().items():
        if group == "experiment":
            continue
        keys = {field.name for field in dataclasses.fields(schema[group])}
        for choice in choices:
            written = yaml.safe_load((CONFIGS / group / f"{choice}.yaml").read_text())
            assert set(written) == keys, (group, choice)
    for kind, written in yaml.safe_load((CONFIGS / "mixers" / "default.yaml").read_text()).items():
        default = dataclasses.asdict(getattr(MixersConfig(), kind))  # its lists are tuples, since it is hashed
        assert written == {key: list(x) if isinstance(x, tuple) else x for key, x in default.items()}, kind


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["attention=spiral"], ["spiral", "local", "ring", "striped", "zigzag"]),
        (["seqlen=4"], ["unknown key 'seqlen'"]),
        (["data.seqlen=4"], ["unknown key 'data.seqlen'", "data.seq_len"]),
        (["seq_len=4"], ["unknown key 'seq_len'", "did you mean data.seq_len"]),
        (["resume=never"], ["did you mean checkpoint.resume"]),
        (["+new=1"], ["cannot read the argument '+new=1'"]),
        (["hydra.run.dir=x"], ["unknown key 'hydra.run.dir'"]),
        (["train.steps"], ["cannot read the argument 'train.steps'", "key=value"]),
        (["train.steps=abc"], ["abc", "Integer", "train.steps"]),
        (["train.steps=1e3"], ["train.steps"]),
        (["train.steps=0"], ["train.steps must be >= 1; given 0"]),
        (["train.global_batch=0"], ["train.global_batch must be >= 1"]),
        (["model.num_kv_heads=3"], ["model.num_heads=4", "model.num_kv_heads=3"]),
        (["engine.dtype=float8"], ["engine.dtype=float8", "float32, bfloat16, float64"]),
        (["engine=deepspeed"], ["deepspeed", "native"]),
        (["attention.layout=spiral"], ["attention.layout=spiral", "contiguous, zigzag, striped"]),
        (
            ["attention.schedule=tree"],
            ["attention.schedule=tree", "ring, double_ring, all_gather, ulysses, usp, local"],
        ),
        (["attention=zigzag", "attention.width=8"], ["attention.width=8 needs attention.layout=striped"]),
        (["attention=striped", "attention.schedule=local"], ["attention.schedule=local", "contiguous"]),
        (["attention.causal=false"], ["unknown key 'attention.causal'"]),
        (["attention.kernel=cutlass"], ["attention.kernel=cutlass", "auto, torch, triton, flash_attn, reference"]),
        (["attention.layers=gdm"], ["attention.layers: 'gdm' is no kind of layer", "gdn", "lightning"]),
        (["attention=gdn_3_1", "model.num_layers=6"], ["model.num_layers=6", "4 or 8"]),
        (["mixers.gdn.conv=3"], ["mixers.gdn.conv=3 has no effect", "no layer 'gdn'"]),
        (["attention=gla", "mixers.gla.gates=none"], ["unknown key 'mixers.gla.gates'"]),
        (["attention=gdn", "attention.schedule=ulysses"], ["attention.schedule=ulysses has no effect"]),
        (["model.head_dim=33"], ["RoPE needs an even head size; given 33"]),
        (["attention=transnormer", "model.head_dim=33"], ["mixers.transnormer.rope=first", "even", "33"]),
        (["optim.lr=-1"], ["optim.lr"]),
        (["optim.warmup_steps=1000"], ["warmup"]),
        (["logger.progress=loud"], ["logger.progress=loud"]),
        (["checkpoint.keep_last=0"], ["checkpoint.keep_last"]),
        (["run_dir="], ["run_dir is empty"]),
    ],
)
def test_mistakes_are_refused_with_the_key_and_the_alternatives(overrides, words):
    with pytest.raises(ValueError) as error:
        load_config(overrides)
    for word in words:
        assert word in str(error.value), str(error.value)


def test_stacks_without_softmax_attention_have_its_limits_neither():
    config = load_config(["attention=gdn", "model.head_dim=15", "model.num_heads=3"])
    assert config.model.num_heads % config.model.num_kv_heads and not config.layers.softmax
    load_config(["attention.layers=gdn+full", "mixers.full.rope=false", "model.head_dim=15"])


@pytest.mark.parametrize(
    ("overrides", "world_size", "message"),
    [
        (["data.seq_len=8190"], 4, "data.seq_len=8190 cannot be divided by parallel.cp=4"),
        (["parallel.cp=4"], 2, "parallel.cp=4 is larger than the world of 2"),
        (["attention=local", "parallel.cp=2"], 2, "parallel.cp must be 1 or null; given parallel.cp=2"),
        (["parallel.dp_shard=2"], 2, "parallel.dp_shard=2 .* needs engine.parameters=shard; given replicate"),
        (["attention=gdn", "data.seq_len=8190"], 4, "data.seq_len=8190 cannot be divided by parallel.cp=4"),
        (["parallel.cp=1"], 4, "train.global_batch=2 is not a multiple of train.micro_batch=1 x dp size 4"),
    ],
)
def test_what_does_not_fit_the_world_is_refused(overrides, world_size, message):
    with pytest.raises(ValueError, match=message):
        check_world(load_config(overrides), world_size=world_size, per_machine=world_size)


def test_the_resolved_config_composes_again_from_its_own_yaml(tmp_path: Path):
    config = load_config(["attention=zigzag", "optim.betas=[0.8,0.99]", "data.seq_len=1_024", "optim.lr=1e-4"])
    written = yaml.safe_load(config.to_yaml())
    assert written["optim"] == {**written["optim"], "betas": [0.8, 0.99], "lr": 1e-4}
    assert written["data"]["seq_len"] == 1024 and written["attention"]["layout"] == "zigzag"
    assert set(written) == {field.name for field in dataclasses.fields(Config)}


def test_the_digest_tells_configs_apart():
    assert load_config([]).digest() == load_config([]).digest() != load_config(["train.seed=7"]).digest()
