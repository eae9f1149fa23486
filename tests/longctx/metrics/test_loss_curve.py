"""loss.png: what is drawn, how often, and what stops a drawing but never the run."""

import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from longctx.metrics.plot import LossCurve, draw, main, smooth, try_draw

PNG = b"\x89PNG\r\n\x1a\n"


def test_plot_takes_gaps_and_leaves_no_temporary_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text(
        '{"step": 1, "loss": "NaN", "lr": 0.0}\n{"step": 2, "loss": 2.0}\n{"step": 2, "held_out_loss": 2}\n'
    )
    (tmp_path / "loss.png").write_bytes(b"old")
    assert main([str(tmp_path)]) == 0
    assert (tmp_path / "loss.png").read_bytes().startswith(PNG)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["loss.png", "metrics.jsonl"]
    assert main([]) == 2
    assert main([str(tmp_path / "absent")]) == 1
    assert "FileNotFoundError" in capsys.readouterr().err


def test_command_draws_a_killed_run_and_says_only_where(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n{"step": 3, "lo')
    command = [sys.executable, "-m", "longctx.metrics.plot", str(tmp_path)]
    root = Path(__file__).resolve().parents[3]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    assert (result.stdout, result.stderr) == (f"{tmp_path / 'loss.png'}\n", "")
    assert (tmp_path / "loss.png").read_bytes().startswith(PNG)


def test_plot_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("")
    with pytest.raises(ValueError, match="holds no loss yet"):
        draw(metrics, tmp_path / "loss.png", title="x")
    metrics.write_text('{"step": 1, "loss": 1.0}\n')
    problem = try_draw(metrics, tmp_path / "no" / "loss.png", title="x")
    assert problem is not None
    assert "loss.png could not be drawn" in problem
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    problem = try_draw(metrics, tmp_path / "loss.png", title="x")
    assert problem is not None
    assert "matplotlib" in problem


def test_moving_mean_does_not_lag() -> None:
    falling = [float(value) for value in range(100, 0, -1)]
    assert smooth(falling) == pytest.approx(falling)
    assert smooth([0.0, 3.0, 0.0, 3.0, 0.0]) == pytest.approx([0.0, 1.0, 1.2, 1.0, 0.0])
    assert smooth([]) == []


def test_steps_are_drawn_as_they_are_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kw: (figures.append(self), save(self, *args, **kw)))
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n{"step": 2, "held_out_loss": 2.5}\n')
    draw(metrics, tmp_path / "loss.png", title="x")
    lines = {line.get_label(): line for line in figures[0].axes[0].get_lines()}
    assert list(lines["training loss"].get_xdata()) == [1, 2]
    assert list(lines["held-out loss"].get_xdata()) == [2]


def test_interrupted_drawing_keeps_the_old_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: Figure, path: Path, **settings: str) -> None:
        path.write_bytes(PNG[:3])
        raise KeyboardInterrupt

    monkeypatch.setattr(Figure, "savefig", interrupted)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    (tmp_path / "loss.png").write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt):
        draw(tmp_path / "metrics.jsonl", tmp_path / "loss.png", title="x")
    assert (tmp_path / "loss.png").read_bytes() == b"old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["loss.png", "metrics.jsonl"]


def test_run_draws_at_most_once_a_minute_and_for_a_hundredth_of_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, cost = 0.0, 0.5
    drawn: list[float] = []

    def drawing(metrics_path: Path, image_path: Path, *, title: str) -> None:
        nonlocal now
        assert (metrics_path, image_path) == (tmp_path / "metrics.jsonl", tmp_path / "loss.png")
        drawn.append(now)
        now += cost

    def evaluate_at(*times: float) -> None:
        nonlocal now
        for time in times:
            now = time
            curve.draw_if_due()

    monkeypatch.setattr("longctx.metrics.plot.draw", drawing)
    curve = LossCurve(tmp_path, report=pytest.fail, clock=lambda: now)
    evaluate_at(1.0, 59.0, 60.0, 100.0, 120.0)
    assert drawn == [60.0]
    cost = 2.0  # a long run: more to read
    evaluate_at(121.0, 184.0, 322.0, 323.0)
    assert drawn == [60.0, 121.0, 323.0]
    curve.draw()  # the end of the run waits for nothing
    assert drawn == [60.0, 121.0, 323.0, 325.0]


def test_problem_is_reported_once(tmp_path: Path) -> None:
    reports: list[str] = []
    curve = LossCurve(tmp_path, report=reports.append)
    curve.draw()
    curve.draw()
    assert len(reports) == 1
    assert "warning: loss.png could not be drawn (FileNotFoundError" in reports[0]
