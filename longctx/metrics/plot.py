"""Draw loss.png from metrics.jsonl.

A run draws after its held-out evaluations and at its end. For one that is still going on, or was killed, draw by hand:
`python -m longctx.metrics.plot RUN_DIRECTORY`.
"""

import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from pathlib import Path

from longctx.metrics.jsonl import Record, read_records

Series = tuple[list[int], list[float]]

DRAW_SECONDS = 60.0  # the least time between two drawings of a run; one takes about half a second


def series(records: Iterable[Record], key: str) -> Series:
    """Return the steps and the values of `key`, without values that are not finite or not numbers."""
    steps: list[int] = []
    values: list[float] = []
    for record in records:
        value = record.get(key)
        if isinstance(value, int | float) and math.isfinite(value):
            steps.append(record["step"])
            values.append(float(value))
    return steps, values


def smooth(values: Sequence[float]) -> list[float]:
    """Return a moving mean over about a twentieth of the values, and at least five, centred on each value.

    A mean of the past alone would lag behind a falling loss, and so seem worse than the held-out points beside it. Near
    the ends the window shrinks on both sides alike, for the same reason.
    """
    sums = [0.0, *accumulate(values)]
    half = max(2, len(values) // 40)
    means = []
    for index in range(len(values)):
        reach = min(half, index, len(values) - 1 - index)
        means.append((sums[index + reach + 1] - sums[index - reach]) / (2 * reach + 1))
    return means


def draw(metrics_path: Path, image_path: Path, *, title: str) -> None:
    """Draw the training loss, its moving mean, held-out loss and learning rate into a PNG, written atomically.

    Raise ValueError if there is no loss to draw, FileNotFoundError without `metrics_path`, ImportError without
    matplotlib, OSError if the image cannot be written.
    """
    # The figure is built without pyplot: no window system, and no global state that a user's notebook would share.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    records = list(read_records(metrics_path))
    steps, losses = series(records, "loss")
    held_out_steps, held_out = series(records, "held_out_loss")
    lr_steps, rates = series(records, "lr")
    if not losses and not held_out:
        raise ValueError(f"{metrics_path} holds no loss yet, so there is nothing to draw")

    figure = Figure(figsize=(9, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    lines = []
    if rates:
        rate_axes = axes.twinx()
        rate_axes.set_ylabel("learning rate", color="tab:green")
        rate_axes.tick_params(axis="y", colors="tab:green")
        rate_axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0), useMathText=True)
        rate_axes.set_ylim(0, 1.1 * max(max(rates), 1e-12))
        lines += rate_axes.plot(lr_steps, rates, color="tab:green", lw=1, ls="--", label="learning rate")
        # The losses lie over the learning rate, and the first axes' own background must not hide it.
        axes.set_zorder(rate_axes.get_zorder() + 1)
        axes.patch.set_visible(False)
    if losses:
        few = "." if len(losses) < 3 else ""
        lines += axes.plot(steps, losses, color="tab:blue", alpha=0.45, lw=1, marker=few, label="training loss")
        lines += axes.plot(steps, smooth(losses), color="tab:blue", lw=2, label="training loss, moving mean")
    if held_out:
        lines += axes.plot(
            held_out_steps, held_out, color="tab:orange", lw=1.5, marker="o", ms=5, label="held-out loss"
        )
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.grid(visible=True, alpha=0.3)
    axes.set_title(title)
    axes.legend(handles=lines, loc="upper right", framealpha=0.9)

    temporary = image_path.with_name(image_path.name + ".tmp")
    try:
        figure.savefig(temporary, format="png")
        temporary.replace(image_path)
    finally:
        temporary.unlink(missing_ok=True)


def try_draw(metrics_path: Path, image_path: Path, *, title: str) -> str | None:
    """Draw as `draw` does, but return what went wrong as a text instead of raising; None if nothing did."""
    try:
        draw(metrics_path, image_path, title=title)
    except Exception as error:
        return f"{image_path.name} could not be drawn ({type(error).__name__}: {error})"
    return None


class LossCurve:
    """Keep a run's loss.png up to date, and never hold up or stop the run for it."""

    def __init__(
        self, run_dir: Path, *, report: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Draw <run_dir>/loss.png; `report` is told what went wrong, each problem once."""
        self._run_dir = run_dir
        self._report = report
        self._clock = clock
        self._due = clock() + DRAW_SECONDS
        self._problem: str | None = None

    def draw_if_due(self) -> None:
        """Draw, but not in the first minute, nor more than once a minute, nor for more than 1 % of the time."""
        if self._clock() >= self._due:
            self.draw()

    def draw(self) -> None:
        """Draw now."""
        begin = self._clock()
        problem = try_draw(
            self._run_dir / "metrics.jsonl", self._run_dir / "loss.png", title=f"{self._run_dir.resolve().name}: loss"
        )
        if problem is not None and problem != self._problem:
            self._report(f"warning: {problem}")
        self._problem = problem
        now = self._clock()
        # All of metrics.jsonl is read at each drawing, which takes seconds once there are a million steps.
        self._due = now + max(DRAW_SECONDS, 100 * (now - begin))


def main(argv: Sequence[str]) -> int:
    """Draw <run directory>/loss.png; return the process's exit status."""
    if len(argv) != 1 or argv[0] in ("-h", "--help"):
        print("usage: python -m longctx.metrics.plot RUN_DIRECTORY", file=sys.stderr)
        return 0 if argv and argv[0] in ("-h", "--help") else 2
    run_dir = Path(argv[0]).resolve()
    problem = try_draw(run_dir / "metrics.jsonl", run_dir / "loss.png", title=f"{run_dir.name}: loss")
    print(problem or run_dir / "loss.png", file=sys.stderr if problem else sys.stdout)
    return 1 if problem else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
