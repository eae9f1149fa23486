"""Settings of the kinds of layers: what is refused, and what a checkpoint has to have in common with a run."""

import dataclasses

import pytest

from longctx.kernels.linear.feature_maps import FEATURE_MAPS
from longctx.mixers.config import MixersConfig, SoftmaxMixerConfig
from longctx.mixers.layers import Layers
from longctx.mixers.pattern import KINDS, LINEAR_KINDS
from longctx.mixers.shape import linear_shape


def changed(kind: str, **changes: object) -> MixersConfig:
    default = MixersConfig()
    return dataclasses.replace(default, **{kind: dataclasses.replace(getattr(default, kind), **changes)})


def test_all_kinds_have_settings_and_the_defaults_are_fine():
    assert tuple(field.name for field in dataclasses.fields(MixersConfig)) == KINDS
    MixersConfig().validate(KINDS, head_dim=8)


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("full", {"gate": "tanh"}, "mixers.full.gate=tanh is not known; known are none, sigmoid"),
        ("gdn", {"conv": 5}, "mixers.gdn.conv=5 is not known; known are 0, 3, 4"),
        ("gdn", {"heads": 0}, "mixers.gdn.heads must be >= 1 or null; given 0"),
        ("gdn", {"chunk_size": -1}, "mixers.gdn.chunk_size must be >= 1 or null"),
        (
            "gdn",
            {"kernel": "cuda"},
            "mixers.gdn.kernel=cuda is not known; known are auto, torch, triton",
        ),
        ("gdn", {"decay": "mamba"}, "mixers.gdn.decay=mamba is not known; known are none, lightning"),
        ("gdn", {"norm": "batch"}, "mixers.gdn.norm=batch is not known; known are none, rms, simple_rms, layer"),
        ("gdn", {"feature_map": "elu1"}, "mixers.gdn.rule=delta is stable with keys of length 1 only: .* must be l2"),
        ("gla", {"feature_map": "softmax"}, "mixers.gla.feature_map=softmax divides each feature .*decay=gla"),
        ("gla", {"redraw_every": 9}, "mixers.gla.redraw_every=9 is an option of feature_map=performer; given identity"),
        ("linear", {"features": 9}, "mixers.linear.features=9 is an option of feature_map=performer; given elu1"),
        ("linear", {"feature_map": "performer", "feature_seed": -1}, "mixers.linear.feature_seed must be >= 0"),
        ("linear", {"rope": "all"}, "mixers.linear.feature_map=elu1 divides by a sum .* mixers.linear.rope=all"),
        ("retention", {"head_dim": 5}, "mixers.retention.rope=all needs an even head_dim; given 5"),
    ],
)
def test_what_can_never_work_is_refused(kind, changes, words):
    with pytest.raises(ValueError, match=words):
        changed(kind, **changes).validate([kind], head_dim=8)


@pytest.mark.parametrize("kind", KINDS)
def test_a_setting_of_a_kind_that_no_layer_has_is_refused(kind):
    other = "full" if kind != "full" else "gdn"
    with pytest.raises(ValueError, match=f"mixers.{kind}.gate=other has no effect: attention.layers names no"):
        changed(kind, gate="other").validate([other], head_dim=8)


def arithmetic(kinds, mixers: MixersConfig | None = None) -> dict[str, object]:
    return Layers(kinds=kinds, mixers=mixers or MixersConfig(), max_positions=64).arithmetic(4, 8)


def test_what_a_checkpoint_has_in_common_with_a_run():
    plain = {"attention.layers": None}
    assert arithmetic(("full",) * 3) == arithmetic(("window",)) == plain
    assert arithmetic(("full", "full"), changed("full", gate="sigmoid"))["mixers.full.gate"] == "sigmoid"
    found = arithmetic(("gdn", "full"))
    assert found["attention.layers"] == "gdn + full" and found["mixers.gdn.conv"] == 4
    assert found["mixers.gdn.heads"] == 4 and found["mixers.gdn.v_head_dim"] == 8  # the model's, by number
    assert not any(key.startswith("mixers.kda") for key in found)
    assert arithmetic(("gdn", "full"), changed("gdn", kernel="reference", chunk_size=16)) == found
    assert arithmetic(("gdn", "full"), changed("gdn", heads=4)) == found
    assert arithmetic(("gdn", "full"), changed("gdn", conv=3)) != found
    assert arithmetic(("full", "gdn")) != found


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_shapes(feature_map):
    mixers = changed("linear", feature_map=feature_map, v_head_dim=5)
    shape = linear_shape(Layers(kinds=("linear",), mixers=mixers, max_positions=64), "linear", heads=3, head_dim=8)
    features = {"cosformer": 16, "performer": 16, "hedgehog": 16}.get(feature_map, 8)
    column = feature_map not in ("identity", "silu", "l2", "softmax")
    states = features * (5 + column) + (8 if feature_map == "softmax" else 0)
    assert shape.state_size == 3 * states
    assert shape.transition_size == 3 * len(shape.recurrences) == 3 * (1 + (feature_map == "softmax"))
    assert shape.flops_per_token == 3 * 4 * 3 * states


def test_transitions_and_flops_by_hand():
    def shape(kind: str):
        return linear_shape(Layers(kinds=(kind,), max_positions=64), kind, heads=2, head_dim=8)

    assert [shape(kind).transition_size for kind in ("lightning", "gla", "gdn", "kda")] == [2, 16, 128, 128]
    assert [shape(kind).flops_per_token for kind in ("lightning", "gdn")] == [3 * 4 * 2 * 64, 3 * 6 * 2 * 64]
    assert shape("gdn").channels == 2 * 3 * 8 and shape("gdn").taps == 4 and shape("gla").channels == 0


def test_softmax_settings():
    assert SoftmaxMixerConfig() == MixersConfig().window and set(LINEAR_KINDS) < set(KINDS)
