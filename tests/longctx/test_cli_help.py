"""The help of `longctx train` says what the configuration says: it is written by hand, so it can fall behind."""

import re

import pytest

from longctx.cli import TRAIN_HELP
from longctx.config import Config, config_groups, load_config

GROUPS, KEYS, EXAMPLES = (
    TRAIN_HELP.partition(begin)[2].partition("\n\n")[0]
    for begin in ("config groups, ", "keys used most, ", "examples:\n")
)


def test_groups_and_choices_are_those_of_the_config_folder():
    groups = re.sub(r"\|\n +", "|", GROUPS)
    listed = {name: sorted(choices.split("|")) for name, choices in re.findall(r"^  (\w+)=(\S+)", groups, re.MULTILINE)}
    assert listed == config_groups()


def test_keys_exist():
    keys = re.findall(r"^  ([\w.]+)=(\S+)", KEYS, re.MULTILINE)
    assert len(keys) > 5
    for key, _ in keys:
        value: object = Config()
        for name in key.split("."):
            assert hasattr(value, name), f"{key} is not a config key"
            value = getattr(value, name)


def test_spelled_out_values_are_accepted():
    spelled = [
        (key, choice)
        for key, values in re.findall(r"^  ([\w.]+)=(\S*\|\S*)", KEYS, re.MULTILINE)
        for choice in values.split("|")
        if choice != "PATH"
    ]
    assert spelled
    for key, choice in spelled:
        load_config([f"{key}={choice}"])


@pytest.mark.parametrize("example", EXAMPLES.strip().splitlines())
def test_examples_are_accepted(example):
    load_config(re.findall(r"(?<!\S)[a-z][\w.]*=\S+", example))
