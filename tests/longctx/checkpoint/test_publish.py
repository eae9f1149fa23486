"""Crash publication and removal at every single file operation; damage checkpoints in every way; choose among them."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from longctx.checkpoint.choose import choose, newest
from longctx.checkpoint.integrity import content_problem, problem, read_extra, stored_keys
from longctx.checkpoint.names import name_of, read_tracker, step_of
from longctx.checkpoint.publish import prune, publish, put_back, remove_leftovers


def _write(folder, step, *, mark, suffix=".writing"):
    path = folder / f"{name_of(step)}{suffix}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"w": torch.full((100,), float(step))}, checkpoint_id=path, no_dist=True)
    (path / "extra.json").write_text(json.dumps({"step": step, "mark": mark}))
    return path


def _publish(folder, *steps):
    for step in steps:
        _write(folder, step, mark="old")
        publish(folder, step=step)
    return folder


class _Crash(BaseException):
    """What no cleaning up can catch, as a killed process."""


def _crash_at(monkeypatch, count):
    """Let the `count`-th change of the file system, from 0, end everything before it happens."""
    seen = []

    def guarded(original):
        def operation(*args, **kwargs):
            if len(seen) == count:
                raise _Crash
            seen.append(original)
            return original(*args, **kwargs)

        return operation

    for name in ("rename", "replace", "unlink"):
        monkeypatch.setattr(Path, name, guarded(getattr(Path, name)))
    for name in ("unlink", "rmdir", "fsync"):
        monkeypatch.setattr(f"os.{name}", guarded(getattr(__import__("os"), name)))


@pytest.mark.parametrize("step", [30, 20])
def test_a_crash_leaves_the_old_or_the_new(tmp_path, monkeypatch, step):
    results = []
    for count in range(200):
        folder = _publish(tmp_path / str(count), 10, 20)
        _write(folder, step, mark="new")
        with monkeypatch.context() as patch:
            _crash_at(patch, count)
            try:
                publish(folder, step=step)
                prune(folder, newest=step, keep_last=1)
                crashed = False
            except _Crash:
                crashed = True
        put_back(folder)
        found = newest(folder, report=lambda message: None)
        extra = read_extra(found)
        assert extra in ({"step": 20, "mark": "old"}, {"step": step, "mark": "new"})
        results.append(extra["mark"])
        remove_leftovers(folder)
        assert newest(folder, report=lambda message: None) == found
        names = [path.name for path in folder.iterdir()]
        assert all(step_of(name) is not None or name == "latest_checkpointed_iteration.txt" for name in names)
        shutil.rmtree(folder)
        if not crashed:
            break
    # Old until the one moment when it becomes new.
    assert results == sorted(results, reverse=True)
    assert results.count("old") >= 3
    assert results.count("new") >= 3


def test_an_error_while_publishing_puts_everything_back(tmp_path, monkeypatch):
    folder = _publish(tmp_path, 10, 20)
    _write(folder, 20, mark="new")

    def fail(self, target):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fail)
        with pytest.raises(OSError, match="No space"):
            publish(folder, step=20)
    assert read_extra(newest(folder, report=print))["mark"] == "old"
    assert content_problem(folder / "iter_0000020.writing") is None
    assert publish(folder, step=20) == folder / "iter_0000020"
    assert read_extra(newest(folder, report=print))["mark"] == "new"


def test_prune_counts_complete_ones_only_and_spares_later_steps(tmp_path):
    folder = _publish(tmp_path, 10, 20, 30, 40, 50)
    (folder / "iter_0000030/.metadata").unlink()
    assert prune(folder, newest=40, keep_last=2) == []
    assert sorted(path.name[-2:] for path in folder.glob("iter_*")) == ["20", "30", "40", "50"]


def _truncate(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def _damage_data(path):
    _truncate(path / "__0_0.distcp")


DAMAGE = {
    "bytes, need": _damage_data,
    "__0_0.distcp cannot be opened": lambda path: (path / "__0_0.distcp").unlink(),
    ".metadata is missing": lambda path: (path / ".metadata").unlink(),
    ".metadata cannot be read": lambda path: _truncate(path / ".metadata"),
    ".metadata cannot be read (A": lambda path: (path / ".metadata").write_bytes(b"\x80\x04}."),
    "extra.json is missing": lambda path: (path / "extra.json").unlink(),
    "extra.json cannot be read": lambda path: _truncate(path / "extra.json"),
    "extra.json holds a list": lambda path: (path / "extra.json").write_text("[]"),
}


@pytest.mark.parametrize("reason", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path, reason):
    folder = _publish(tmp_path / "checkpoints", 10, 20)
    DAMAGE[reason](folder / "iter_0000020")
    messages = []
    assert choose(tmp_path, resume="auto", report=messages.append) == folder / "iter_0000010"
    assert len(messages) == 1
    assert "iter_0000020 is not complete" in messages[0]
    assert reason in messages[0]
    with pytest.raises(ValueError, match=r"checkpoint\.resume .*not complete") as caught:
        choose(tmp_path, resume=str(folder / "iter_0000020"), report=print)
    assert reason in str(caught.value)


def test_any_byte_lost_from_the_end_of_the_index_is_noticed(tmp_path):
    path = _publish(tmp_path, 10) / "iter_0000010"
    whole = (path / ".metadata").read_bytes()
    for length in range(0, len(whole), 7):
        (path / ".metadata").write_bytes(whole[:length])
        assert "cannot be read" in problem(path)
    (path / ".metadata").write_bytes(whole)
    assert problem(path) is None
    assert stored_keys(path) == {"w"}


@pytest.mark.parametrize(
    ("text", "expected", "word"),
    [
        ("20", 20, "passed over"),
        ("99", 30, "no iter_0000099"),
        ("release", 30, "'release'"),
        ("", 30, "instead of a step"),
        (None, 30, "missing"),
    ],
)
def test_the_tracker_decides(tmp_path, text, expected, word):
    folder = _publish(tmp_path / "checkpoints", 10, 20, 30)
    tracker = folder / "latest_checkpointed_iteration.txt"
    assert read_tracker(folder) == 30
    if text is None:
        tracker.unlink()
    else:
        tracker.write_text(text)
    messages = []
    found = choose(tmp_path, resume="auto", report=messages.append)
    assert found == folder / name_of(expected)
    assert word in messages[0]


def test_what_resume_accepts(tmp_path):
    folder = _publish(tmp_path / "run/checkpoints", 10, 20)
    run, one = tmp_path / "run", folder / "iter_0000010"
    assert choose(run, resume="never", report=print) is None
    assert choose(tmp_path / "new", resume="auto", report=print) is None
    assert choose(tmp_path / "new", resume=str(run), report=print) == folder / "iter_0000020"
    assert choose(tmp_path / "new", resume=str(folder), report=print) == folder / "iter_0000020"
    assert choose(tmp_path / "new", resume=str(one), report=print) == one
    messages = []
    assert choose(run, resume=str(one), report=messages.append) == one
    assert messages == [f"this run has a checkpoint of its own at step 20; checkpoint.resume={one} leaves it aside"]
    renamed = one.rename(tmp_path / "best")
    assert choose(run, resume=str(renamed), report=print) == renamed
    _write(folder, 30, mark="half")
    for path in (
        "nowhere",
        "run/checkpoints/iter_0000030.writing",
        "run/checkpoints/latest_checkpointed_iteration.txt",
    ):
        with pytest.raises(ValueError, match=r"checkpoint\.resume"):
            choose(run, resume=str(tmp_path / path), report=print)


def test_leftovers_are_removed_and_told(tmp_path):
    folder = _publish(tmp_path, 10)
    _write(folder, 20, mark="half")
    _write(folder, 5, mark="old", suffix=".removing")
    assert remove_leftovers(folder) == ["removed iter_0000020.writing, left by an interrupted save"]
    assert sorted(path.name for path in folder.iterdir()) == ["iter_0000010", "latest_checkpointed_iteration.txt"]
