"""Layers may change between checkpoints where only what queries look at is another; everything else is refused."""

import dataclasses
import json
import re

import pytest
import torch

from longctx.checkpoint.layers import compare_layers, describe_loaded
from longctx.checkpoint.partial import Loaded, lacking, leaves
from longctx.mixers.config import MixersConfig
from longctx.mixers.layers import Layers
from longctx.mixers.pattern import SOFTMAX_KINDS, SPARSE_KINDS


def layers(kinds: str, **settings: dict[str, object]) -> Layers:
    mixers = MixersConfig()
    changed = {kind: dataclasses.replace(getattr(mixers, kind), **values) for kind, values in settings.items()}
    return Layers(kinds=tuple(kinds.split()), mixers=dataclasses.replace(mixers, **changed))


def change(old: Layers, new: Layers):
    saved = json.loads(json.dumps(old.arithmetic(4, 8)))
    return compare_layers(saved, json.loads(json.dumps(old.kinds)), new, heads=4, head_dim=8)


@pytest.mark.parametrize("old", [*SOFTMAX_KINDS, *SPARSE_KINDS])
@pytest.mark.parametrize("new", [*SOFTMAX_KINDS, *SPARSE_KINDS])
def test_softmax_attention_may_become_any_other(old, new):
    found = change(layers(f"{old} gdn {old}"), layers(f"{old} gdn {new}"))
    if old == new:
        assert found.words == () and found.layers == frozenset()
    else:
        assert found.words == (f"the layers were {old} + gdn + {old}, are {old} + gdn + {new}",)
        assert found.layers == {2}


def test_windows_instead_of_everything_are_told_with_the_mask():
    found = change(layers("full full"), layers("window window"))
    assert found.words == () and found.layers == {0, 1}
    assert change(layers("window window"), layers("moba moba")).words == ("the layers were window*2, are moba*2",)


def test_settings_of_sparse_layers_may_change():
    found = change(
        layers("moba full vertical_slash", moba={"topk": 3}),
        layers("moba full vertical_slash", moba={"topk": 4, "kernel": "reference"}, vertical_slash={"slash": (9,)}),
    )
    assert found.words == ("mixers.moba.topk was 3, is 4", "mixers.vertical_slash.slash was [], is [9]")
    assert found.layers == {0, 2}
    same = layers("vertical_slash", vertical_slash={"vertical": (0, 5), "slash": (9,)})
    assert change(same, same).words == ()
    only = change(layers("moba moba", moba={"topk": 3}), layers("moba full", moba={"topk": 4}))
    assert only.words == ("the layers were moba*2, are moba + full", "mixers.moba.topk was 3, is 4")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("gdn full", "gdn gdn", "attention.layers is 'gdn + full' in the checkpoint, 'gdn*2' in the config"),
        ("gdn moba", "full moba", "attention.layers is 'gdn + moba' in the checkpoint, 'full + moba' in the config"),
        ("gdn full", "full gdn", "attention.layers is 'gdn + full' in the checkpoint, 'full + gdn' in the config"),
        ("gla moba", "kda moba", "attention.layers is 'gla + moba' in the checkpoint, 'kda + moba' in the config"),
        ("full full", "gdn full", "attention.layers is None in the checkpoint, 'gdn + full' in the config"),
        ("gdn gdn", "full full", "attention.layers is 'gdn*2' in the checkpoint, None in the config"),
    ],
)
def test_linear_layers_may_not_change(old, new, words):
    with pytest.raises(ValueError, match=re.escape(f"checkpoint of another layer stack: {words}; use")):
        change(layers(old), layers(new))


def test_settings_of_linear_layers_may_not_change():
    with pytest.raises(ValueError, match="mixers.gdn.conv is 4 in the checkpoint, 3 in the config"):
        change(layers("gdn full"), layers("gdn moba", gdn={"conv": 3}))
    assert change(layers("gdn full"), layers("gdn moba", gdn={"kernel": "reference"})).layers == {1}


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (
            layers("full full"),
            layers("full moba", moba={"rope": False}),
            "layer 1 has mixers.full.rope=true in the checkpoint, mixers.moba.rope=false in the config.*"
            "set mixers.moba.rope=true",
        ),
        (
            layers("moba", moba={"gate": "sigmoid"}),
            layers("full"),
            "layer 0 has mixers.moba.gate=sigmoid in the checkpoint, mixers.full.gate=none in the config.*"
            "set mixers.full.gate=sigmoid",
        ),
        (
            layers("full"),
            layers("full", full={"gate": "sigmoid"}),
            "layer 0 has mixers.full.gate=none in the checkpoint, mixers.full.gate=sigmoid in the config",
        ),
    ],
)
def test_rope_and_gates_stay_with_their_layer(old, new, words):
    with pytest.raises(ValueError, match=words):
        change(old, new)


def test_a_layer_with_a_gate_of_another_kind_keeps_it():
    found = change(layers("full", full={"gate": "sigmoid"}), layers("nsa", nsa={"gate": "sigmoid"}))
    assert found.words == ("the layers were full, are nsa",)


def test_settings_that_an_older_checkpoint_does_not_know_had_their_default():
    saved = layers("moba").arithmetic(4, 8)
    del saved["mixers.moba.topk"], saved["mixers.moba.rope"]
    assert compare_layers(saved, ("moba",), layers("moba"), heads=4, head_dim=8).words == ()
    found = compare_layers(saved, ("moba",), layers("moba", moba={"topk": 9}), heads=4, head_dim=8)
    assert found.words == ("mixers.moba.topk was 3, is 9",)


def test_only_the_selection_of_layers_that_changed_may_begin_anew():
    found = change(layers("full full full"), layers("full nsa nsa"))
    may = [
        "model.blocks.1.attention.sparse.branch_gates.weight",
        "optimizer.state.blocks.2.attention.sparse.branch_gates.weight.exp_avg",
    ]
    not_so = [
        "model.blocks.0.attention.sparse.branch_gates.weight",
        "model.blocks.12.attention.sparse.branch_gates.weight",
        "model.blocks.1.attention.q_proj.weight",
        "optimizer.state.blocks.1.attention.g_proj.weight.step",
        "optimizer.param_groups.0.betas",
    ]
    assert all(map(found.may_begin, may)) and not any(map(found.may_begin, not_so))


def test_what_is_said_of_parameters():
    own = "attention.sparse.router.weight"
    blocks = (0, 1, 2, 4)
    loaded = Loaded(
        left=(
            *(f"model.blocks.{n}.{own}" for n in blocks),
            *(f"optimizer.state.blocks.{n}.{own}.{each}" for n in blocks for each in ("step", "exp_avg")),
            "optimizer.state.blocks.7.attention.sparse.gate_q.step",
        ),
        unused=(
            "model.blocks.3.attention.sparse.gate_k",
            "model.blocks.3.attention.sparse.gate_q",
            "optimizer.state.blocks.3.attention.sparse.gate_q.step",
            "rng.rank1",
        ),
    )
    assert describe_loaded(loaded) == [
        "begin with initial values, which the checkpoint does not have: attention.sparse.router.weight (blocks 0-2, 4)",
        "begin with a new state of the optimizer, as they were not trained: attention.sparse.gate_q (block 7)",
        "of the checkpoint, no layer uses: attention.sparse.gate_k (block 3), attention.sparse.gate_q (block 3)",
    ]
    assert describe_loaded(Loaded(left=(), unused=("rng.rank0",))) == []


def test_names_are_those_of_dcp_and_what_lacks_is_told_apart():
    tree = {"model": {"a.b": torch.zeros(3), "c": torch.zeros(2)}, "groups": [{"lr": 0.1, "params": ["a.b"]}]}
    found = leaves(tree)
    assert list(found) == ["model.a.b", "model.c", "groups.0.lr", "groups.0.params"]
    stored = {"model.a.b": (4,), "groups.0.lr": None}
    assert lacking(found, stored, lambda name: True) == ("model.a.b", "model.c", "groups.0.params")
    assert lacking(found, stored, lambda name: name == "model.c") == ("model.c",)
