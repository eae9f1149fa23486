"""The console: a bar or lines, never both; texts by literal values."""

import importlib.util
import io
import math
import sys

import pytest

from longctx.metrics.progress import BarProgress, LineProgress, Status, human_number, human_seconds, make_progress


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def _status(step: int) -> Status:
    return Status(step=step, loss=3.2104, tokens_per_second=1234.0, eta_seconds=80.2)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.5, "0.5"),
        (950, "950"),
        (999.6, "1.0k"),
        (1234, "1.2k"),
        (34_567, "34.6k"),
        (999_960, "1.00M"),
        (1_204_000, "1.20M"),
        (3.3e9, "3.30G"),
        (2.5e15, "2.50P"),
        (math.nan, "nan"),
    ],
)
def test_human_number(value: float, text: str) -> None:
    assert human_number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0s"),
        (59.6, "1m00s"),
        (80.2, "1m20s"),
        (3599.7, "1h00m"),
        (7500, "2h05m"),
        (273_600, "3d04h"),
        (math.inf, "?"),
        (-3, "0s"),
    ],
)
def test_human_seconds(seconds: float, text: str) -> None:
    assert human_seconds(seconds) == text


def test_lines_are_printed_when_due() -> None:
    out = io.StringIO()
    progress = make_progress("auto", total_steps=60, start_step=0, stream=out, bar_stream=io.StringIO())
    progress.update(_status(12), due=True)
    progress.update(_status(13), due=False)
    progress.message("checkpoint written")
    progress.close()
    assert out.getvalue() == "step 12/60  loss 3.210  1.2k tok/s  eta 1m20s\ncheckpoint written\n"


def test_unknown_numbers_are_left_out() -> None:
    out = io.StringIO()
    progress = make_progress("lines", total_steps=6, start_step=0, stream=out)
    progress.update(Status(step=1, loss=math.nan, tokens_per_second=None, eta_seconds=None), due=True)
    assert out.getvalue() == "step 1/6  loss nan\n"


def test_bar_shows_every_step_and_messages_go_to_the_output() -> None:
    pytest.importorskip("tqdm")
    out, terminal = io.StringIO(), _Terminal()
    progress = make_progress("auto", total_steps=60, start_step=11, stream=out, bar_stream=terminal)
    assert isinstance(progress, BarProgress)
    progress.update(_status(12), due=True)
    progress.message("checkpoint written")
    progress.close()
    frames = terminal.getvalue().split("\r")
    assert "step 11/60" in frames[1]
    last = frames[-1].strip()
    assert last.startswith("step 12/60 |")
    assert last.endswith("| loss 3.210  1.2k tok/s  eta 1m20s")
    assert out.getvalue() == "checkpoint written\n"


def test_off_still_prints_messages() -> None:
    out, terminal = io.StringIO(), _Terminal()
    progress = make_progress("off", total_steps=6, start_step=0, stream=out, bar_stream=terminal)
    progress.update(_status(1), due=True)
    progress.message("hello")
    progress.close()
    assert (out.getvalue(), terminal.getvalue()) == ("hello\n", "")


def test_without_tqdm_auto_prints_lines_and_bar_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    progress = make_progress("auto", total_steps=6, start_step=0, stream=io.StringIO(), bar_stream=_Terminal())
    assert type(progress) is LineProgress
    with pytest.raises(ValueError, match=r"logger\.progress=bar needs the package tqdm"):
        make_progress("bar", total_steps=6, start_step=0)


def test_unknown_kind_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"logger\.progress=fancy is unknown: take one of auto, bar, lines, off"):
        make_progress("fancy", total_steps=6, start_step=0)
