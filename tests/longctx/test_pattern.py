"""Patterns of layers: what they mean, how they are said, and what is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longctx.mixers.pattern import KINDS, depth, describe_layers, parse_layers


@pytest.mark.parametrize(
    ("layers", "num_layers", "kinds"),
    [
        ("gdn", 3, ["gdn", "gdn", "gdn"]),
        ("gdn*3 + full", 4, ["gdn", "gdn", "gdn", "full"]),
        (" lightning * 2+full*1 ", 6, ["lightning", "lightning", "full"] * 2),
        ("full + gdn + full", 3, ["full", "gdn", "full"]),
        (["kda", "full"], 2, ["kda", "full"]),
    ],
)
def test_patterns(layers, num_layers, kinds):
    assert parse_layers(layers, num_layers=num_layers) == tuple(kinds)


@pytest.mark.parametrize(
    ("layers", "num_layers", "words"),
    [
        ("gdn*3 + full", 6, "has 4 layers, of which model.num_layers=6 is no multiple: set .* such as 4 or 8"),
        ("lightning*7 + full", 2, "set model.num_layers to one such as 8,"),
        (["gdn", "full"], 3, "names 2 layers, model.num_layers=3"),
        ("gnd", 2, "'gnd' is no kind of layer; known are full, window, moba, nsa"),
        (["gdn", "softmax"], 2, "'softmax' is no kind of layer"),
        ("gdn*0", 2, "cannot read 'gdn\\*0'; write kinds with counts >= 1"),
        ("3*gdn", 3, "cannot read '3\\*gdn'"),
        ("gdn*3 full", 4, "cannot read 'gdn\\*3 full'"),
        ("gdn*3 +", 3, "cannot read ''"),
        ("", 3, "cannot read ''"),
        ("gdn*99999999999", 3, "cannot read"),
        ([], 2, "must be a pattern such as .* given \\[\\]"),
        (4, 4, "must be a pattern such as .* given 4"),
        ([["gdn"]], 1, "must be a pattern"),
    ],
)
def test_what_is_no_pattern_is_refused(layers, num_layers, words):
    with pytest.raises(ValueError, match=words) as error:
        parse_layers(layers, num_layers=num_layers)
    assert "attention.layers" in str(error.value)


@given(st.lists(st.sampled_from(KINDS), min_size=1, max_size=12))
def test_a_description_is_a_pattern_again(kinds):
    told = describe_layers(kinds)
    if told.startswith("("):
        once, rounds = told[1:].split(") x ")
        assert parse_layers(once, num_layers=len(kinds)) == tuple(kinds) and int(rounds) > 1
    else:
        assert parse_layers(told, num_layers=len(kinds)) == tuple(kinds)


@pytest.mark.parametrize(
    ("layers", "layers_of_a_model"),
    [(None, 2), ("gdn", 2), ("gdn*3 + full", 4), ("lightning*7 + full*1", 8), (["gdn"], 1), ("a + b", None)],
)
def test_a_model_without_a_depth_of_its_own_is_as_deep_as_the_pattern(layers, layers_of_a_model):
    if layers_of_a_model is None:
        with pytest.raises(ValueError, match="no kind of layer"):
            depth(layers)
    else:
        assert depth(layers) == layers_of_a_model


def test_descriptions():
    assert describe_layers(["gdn"] * 4) == "gdn*4"
    assert describe_layers(["gdn", "gdn", "full"] * 2) == "(gdn*2 + full) x 2"
    assert describe_layers(["full"]) == "full"
