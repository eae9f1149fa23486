"""The options: what is contradictory is refused, and the committed config groups are complete."""

from dataclasses import asdict, fields
from pathlib import Path

import pytest
import yaml

from longctx.data.config import SOURCES, DataConfig

GROUP = Path(__file__).parents[3] / "configs" / "data"


def test_default_is_valid_and_is_the_stdlib_group() -> None:
    DataConfig().validate()
    assert yaml.safe_load((GROUP / "stdlib.yaml").read_text()) == asdict(DataConfig())


@pytest.mark.parametrize("source", SOURCES)
def test_groups_have_every_key_and_a_comment_for_each(source: str) -> None:
    text = (GROUP / f"{source}.yaml").read_text()
    options = yaml.safe_load(text)
    assert list(options) == [field.name for field in fields(DataConfig)]
    assert options["source"] == source
    lines = text.splitlines()
    assert lines[0].startswith("# ")
    assert all(lines[i].startswith("# ") for i in range(1, len(lines), 2)), "one comment line above each key"
    assert len(lines) == 1 + 2 * len(options)
    if source != "stdlib":
        options["path"] = "somewhere"
    DataConfig(**options).validate()


def test_no_other_groups() -> None:
    assert sorted(path.stem for path in GROUP.glob("*.yaml")) == sorted(SOURCES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "stdlibs"}, "data.source='stdlibs' is unknown; choose one of stdlib, folder, txt, jsonl, bin"),
        (
            {"path": "x"},
            r"data.path='x' .* is not read by data.source='stdlib'; set data.path=null .*folder, txt, jsonl, bin",
        ),
        ({"source": "folder"}, "data.source='folder' needs data.path"),
        (
            {"source": "folder", "path": "x", "text_key": "t"},
            "data.text_key='t' .* is not read by data.source='folder'",
        ),
        ({"source": "jsonl", "path": "x", "text_key": "t", "separator": "-"}, "data.separator='-' .* is not read"),
        ({"source": "jsonl", "path": "x"}, "needs data.text_key"),
        ({"source": "bin", "path": "x", "append_eod": False, "glob": "*"}, "data.glob='\\*' .* is not read"),
        ({"source": "bin", "path": "x"}, "set data.append_eod=false"),
        ({"source": "txt", "path": "x", "glob": ""}, "data.glob is empty"),
        ({"source": "txt", "path": "x", "separator": "--\n"}, "data.separator"),
        ({"tokenizer": ""}, "data.tokenizer is empty"),
        ({"eod_token": "</s>"}, "data.eod_token='</s>'.* set data.eod_token=null"),
        ({"cache_dir": ""}, "data.cache_dir is empty"),
        ({"seq_len": 0}, "data.seq_len=0"),
        ({"seed": -1}, "data.seed=-1"),
        ({"held_out": 1.0}, "data.held_out=1.0"),
        ({"held_out": -0.1}, "data.held_out=-0.1"),
        ({"held_out": float("nan")}, "data.held_out=nan"),
    ],
)
def test_contradictions(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(**options).validate()
