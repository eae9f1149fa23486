"""Descriptions of models, and of the code."""

import json
import re
import subprocess

import pytest

import longctx
from longctx.checkpoint import compare_models, version

MODEL = {"dim": 128, "rope": {"theta": 1e4, "scaling": None}, "layers": (1, 2), "tied": True}


def test_equal_models_pass_also_after_json():
    compare_models(MODEL, MODEL)
    compare_models(json.loads(json.dumps(MODEL)), MODEL)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"dim": 256}, "model.dim is 256 in the checkpoint, 128 in the config"),
        ({"dim": 256, "tied": False}, "model.dim is 256"),
        ({"rope": {"theta": 5e5, "scaling": None}}, "model.rope.theta is 500000.0 in the checkpoint, 10000.0 in"),
        ({"rope": {"theta": 1e4}}, "model.rope.scaling is not set in the checkpoint, None in the config"),
        ({"rope": None}, "model.rope is None in the checkpoint, {'theta'"),
        ({"layers": [1, 3]}, "model.layers is [1, 3] in the checkpoint, (1, 2) in the config"),
        ({"tied": 1}, "model.tied is 1 in the checkpoint, True in the config"),
        ({"experts": 8}, "model.experts is 8 in the checkpoint, not set in the config"),
    ],
)
def test_the_first_difference_is_named_with_both_values(change, text):
    with pytest.raises(ValueError, match="checkpoint of another model: ") as caught:
        compare_models({**MODEL, **change}, MODEL)
    assert text in str(caught.value)
    assert str(caught.value).count("in the checkpoint") == 1


def _git(folder, *arguments):
    subprocess.run(
        ["git", "-C", folder, "-c", "user.name=n", "-c", "user.email=e", *arguments], check=True, capture_output=True
    )


def test_code_version_names_commit_and_changes(tmp_path, monkeypatch):
    code_version = version.code_version.__wrapped__  # asked once per process, as the loaded code does not change
    package = tmp_path / "longctx"
    package.mkdir()
    source = package / "__init__.py"
    source.write_text("")
    monkeypatch.setattr(version.longctx, "__file__", str(source))
    unknown = f"{longctx.__version__}+unknown"
    assert code_version() == unknown
    _git(tmp_path, "init", "-q")
    _git(tmp_path, "commit", "-q", "--allow-empty", "-m", "a")
    assert code_version() == unknown, "an untracked package is not that checkout's"
    _git(tmp_path, "add", "longctx")
    _git(tmp_path, "commit", "-q", "-m", "b")
    assert re.fullmatch(rf"{re.escape(longctx.__version__)}\+[0-9a-f]{{12}}", code_version())
    source.write_text("changed = True")
    assert code_version().endswith("-dirty")
    monkeypatch.setattr(version.subprocess, "run", _no_git)
    assert code_version() == unknown


def _no_git(*args, **kwargs):
    raise FileNotFoundError("git")


def test_other_things_than_models_are_called_by_their_name():
    with pytest.raises(
        ValueError, match=r"^checkpoint of another data: data\.seed is 1 .* use the checkpoint's data, or"
    ):
        compare_models({"seed": 1}, {"seed": 2}, prefix="data")
