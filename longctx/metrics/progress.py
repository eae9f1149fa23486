"""Show a run on the console: a bar on a terminal, one line per interval elsewhere, never both."""

import importlib
import importlib.util
import math
import os
import sys
from dataclasses import dataclass
from typing import Any, Protocol, TextIO

from longctx.metrics.config import PROGRESS_KINDS


@dataclass(frozen=True, kw_only=True)
class Status:
    """What the console shows of one step. None where a number is not known."""

    step: int
    loss: float | None
    tokens_per_second: float | None
    eta_seconds: float | None


class Progress(Protocol):
    """Something that shows steps and messages."""

    def update(self, status: Status, *, due: bool) -> None:
        """Show a step. `due` says that a line per interval would be printed at this one."""
        ...

    def message(self, text: str) -> None:
        """Print a text of its own, which stays on the screen."""
        ...

    def close(self) -> None:
        """Leave the console ready for other output."""
        ...


def human_number(value: float) -> str:
    """Return a short text such as 950, 1.2k, 34.5k, 1.20M."""
    if not math.isfinite(value):
        return str(value)
    if abs(value) < 999.5:
        return f"{value:.3g}"
    for size, letter in ((1e3, "k"), (1e6, "M"), (1e9, "G"), (1e12, "T"), (1e15, "P")):
        scaled = value / size
        # Rounding decides which letter is taken: 999,960 is "1.00M", not "1000.0k".
        if abs(scaled) < 999.95 or letter == "P":
            return f"{scaled:.1f}{letter}" if letter == "k" else f"{scaled:.2f}{letter}"
    raise AssertionError("the last letter takes every number")


def human_seconds(seconds: float) -> str:
    """Return a short text such as 42s, 1m20s, 2h05m, 3d04h."""
    if not math.isfinite(seconds):
        return "?"
    whole = max(round(seconds), 0)
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if days:
        return f"{days}d{hours % 24:02d}h"
    if hours:
        return f"{hours}h{minutes % 60:02d}m"
    if minutes:
        return f"{minutes}m{whole % 60:02d}s"
    return f"{whole}s"


def describe(status: Status) -> str:
    """Return the numbers of a step as text, without the step itself."""
    parts = []
    if status.loss is not None:
        parts.append(f"loss {status.loss:.3f}")
    if status.tokens_per_second is not None:
        parts.append(f"{human_number(status.tokens_per_second)} tok/s")
    if status.eta_seconds is not None:
        parts.append(f"eta {human_seconds(status.eta_seconds)}")
    return "  ".join(parts)


class BarProgress:
    """A tqdm bar on `bar_stream`; messages go to `stream`, above the bar where both are the same terminal."""

    def __init__(self, *, total_steps: int, start_step: int, stream: TextIO, bar_stream: TextIO) -> None:
        """Draw the bar at `start_step`. Raise ValueError if tqdm is not installed."""
        try:
            tqdm: Any = importlib.import_module("tqdm").tqdm
        except ImportError as error:
            raise ValueError(
                f"logger.progress=bar needs the package tqdm ({error}): `pip install tqdm`, or set "
                "logger.progress=lines"
            ) from error
        tqdm.monitor_interval = 0  # no thread of its own: each step redraws the bar
        self._tqdm = tqdm
        self._stream = stream
        self._bar = tqdm(
            total=total_steps,
            initial=start_step,
            file=bar_stream,
            dynamic_ncols=True,
            miniters=1,
            bar_format="step {n_fmt}/{total_fmt} |{bar}| {desc}",
        )

    def update(self, status: Status, *, due: bool) -> None:
        """Redraw the bar, at most ten times a second."""
        self._bar.set_description_str(describe(status), refresh=False)
        self._bar.update(status.step - self._bar.n)

    def message(self, text: str) -> None:
        """Print `text` above the bar."""
        self._tqdm.write(text, file=self._stream)
        self._stream.flush()

    def close(self) -> None:
        """Draw the bar's last state and leave it standing."""
        self._bar.refresh()
        self._bar.close()


class LineProgress:
    """One line per interval, flushed at once, so that a log file can be followed."""

    def __init__(self, *, total_steps: int, stream: TextIO) -> None:
        """Print to `stream`."""
        self._total_steps = total_steps
        self._stream = stream

    def update(self, status: Status, *, due: bool) -> None:
        """Print the step if it is due."""
        if due:
            self.message(f"step {status.step}/{self._total_steps}  {describe(status)}")

    def message(self, text: str) -> None:
        """Print `text`."""
        print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Do nothing: every line is already out."""


class MessageProgress(LineProgress):
    """No steps, only messages: `logger.progress="off"`."""

    def update(self, status: Status, *, due: bool) -> None:
        """Show nothing."""


class SilentProgress:
    """Nothing at all: every rank but the first."""

    def update(self, status: Status, *, due: bool) -> None:
        """Show nothing."""

    def message(self, text: str) -> None:
        """Show nothing."""

    def close(self) -> None:
        """Do nothing."""


def _is_terminal(stream: TextIO) -> bool:
    """Tell whether a bar can be drawn: a terminal, and one that says how wide it is."""
    if not stream.isatty():
        return False
    try:
        return os.get_terminal_size(stream.fileno()).columns > 0
    except (OSError, ValueError):
        return True


def make_progress(
    kind: str,
    *,
    total_steps: int,
    start_step: int,
    stream: TextIO | None = None,
    bar_stream: TextIO | None = None,
) -> Progress:
    """Build what `logger.progress` asks for; "auto" is a bar if standard error is a terminal, else lines.

    Lines and messages go to `stream` (standard output), the bar to `bar_stream` (standard error), so that the output
    can be sent to a file while the bar stays in view. Raise ValueError for an unknown kind.
    """
    stream = sys.stdout if stream is None else stream
    bar_stream = sys.stderr if bar_stream is None else bar_stream
    if kind == "auto":
        kind = "bar" if _is_terminal(bar_stream) and importlib.util.find_spec("tqdm") is not None else "lines"
    if kind == "bar":
        return BarProgress(total_steps=total_steps, start_step=start_step, stream=stream, bar_stream=bar_stream)
    if kind == "lines":
        return LineProgress(total_steps=total_steps, stream=stream)
    if kind == "off":
        return MessageProgress(total_steps=total_steps, stream=stream)
    raise ValueError(f"logger.progress={kind} is unknown: take one of {', '.join(PROGRESS_KINDS)}")
