"""MetricsLogger as the trainer uses it: resume, other ranks, sinks that fail, configuration."""

import dataclasses
import importlib
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from longctx.metrics import LoggerConfig, WandbConfig
from longctx.metrics.jsonl import read_records
from longctx.metrics.logger import MetricsLogger
from longctx.metrics.sink import GuardedSink
from longctx.metrics.wandb import WandbSink

PNG = b"\x89PNG\r\n\x1a\n"
CONFIGS = Path(__file__).resolve().parents[3] / "configs" / "logger"


def _logger(run_dir: Path, *, rank: int = 0, start_step: int = 0, state: Any = None, **settings: Any) -> MetricsLogger:
    config = LoggerConfig(**({"progress": "lines"} | settings))
    config.validate()
    return MetricsLogger(
        config,
        run_dir=run_dir,
        rank=rank,
        total_steps=6,
        start_step=start_step,
        resolved_config={"optim": {"lr": 0.1}},
        state=state,
    )


def _metrics(step: int) -> dict[str, float]:
    return {"loss": 6.0 - step, "lr": 0.1, "tokens_per_second": 1000.0, "step_seconds": 2.0}


def test_run_and_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "run"
    with _logger(run_dir, log_every=2) as logger:
        for step in range(1, 5):
            logger.log(step, _metrics(step))
            if step == 3:
                logger.evaluation(step, {"held_out_loss": 2.25})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  eta")[0] for line in lines] == [
        "step 1/6  loss 5.000  1.0k tok/s",
        "step 2/6  loss 4.000  1.0k tok/s",
        "step 3/6  held-out loss 2.25",
        "step 4/6  loss 2.000  1.0k tok/s",
    ]
    assert (run_dir / "loss.png").read_bytes().startswith(PNG)

    with _logger(run_dir, log_every=2, start_step=3) as logger:
        for step in range(4, 7):
            logger.log(step, _metrics(step))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "metrics.jsonl: dropped 1 line(s) of steps after 3, or cut off, which are written again"
    assert [line.split("  loss")[0] for line in lines[1:]] == ["step 4/6", "step 6/6"]
    records = list(read_records(run_dir / "metrics.jsonl"))
    assert [record["step"] for record in records] == [1, 2, 3, 3, 4, 5, 6]
    assert records[3] == {"step": 3, "held_out_loss": 2.25}
    assert records[6] == {"step": 6, **_metrics(6)}
    assert sorted(p.name for p in run_dir.iterdir()) == ["loss.png", "metrics.jsonl"]


def test_other_ranks_do_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "run"
    wandb = WandbConfig(mode="online")
    with _logger(run_dir, rank=1, wandb=wandb, tensorboard=True, state={"wandb_run_id": "abc"}) as logger:
        logger.log(1, _metrics(1))
        logger.evaluation(1, {"held_out_loss": 1.0})
        logger.message("hello")
        assert logger.state() == {"wandb_run_id": "abc"}
    assert not run_dir.exists()
    assert capsys.readouterr() == ("", "")


def test_step_out_of_range_is_our_mistake(tmp_path: Path) -> None:
    with _logger(tmp_path, start_step=2) as logger:
        for step in (2, 7):
            with pytest.raises(AssertionError, match=f"2 < {step} <= 6"):
                logger.log(step, _metrics(step))


def test_close_twice_and_log_after_close_are_harmless(tmp_path: Path) -> None:
    logger = _logger(tmp_path)
    logger.log(1, _metrics(1))
    logger.close()
    logger.close()
    logger.log(2, _metrics(2))
    assert len(list(read_records(tmp_path / "metrics.jsonl"))) == 1


def test_long_run_draws_after_an_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longctx.metrics.plot.DRAW_SECONDS", 0.0)  # a minute has gone by
    with _logger(tmp_path) as logger:
        logger.log(1, _metrics(1))
        assert not (tmp_path / "loss.png").exists()
        logger.evaluation(1, {"held_out_loss": 2.0})
        assert (tmp_path / "loss.png").read_bytes().startswith(PNG)


def test_second_interrupt_leaves_the_drawing_but_closes_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: Any, **settings: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("longctx.metrics.plot.draw", interrupted)
    fake = _fake_wandb(monkeypatch)
    with pytest.raises(KeyboardInterrupt), _logger(tmp_path, wandb=WandbConfig(mode="offline")) as logger:
        logger.log(1, _metrics(1))
    assert fake.run.finished
    logger.close()


def test_run_directory_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(ValueError, match=r"the run directory .* cannot be written"):
        _logger(tmp_path / "run")


def test_run_without_any_loss_ends_with_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _logger(tmp_path).close()
    assert "warning: loss.png could not be drawn" in capsys.readouterr().out
    assert not (tmp_path / "loss.png").exists()


class _BrokenSink:
    def __init__(self) -> None:
        self.calls = 0

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.calls += 1
        raise BrokenPipeError("the service is gone")

    def close(self) -> None:
        self.calls += 1


def test_sink_that_breaks_is_reported_once_and_left_alone() -> None:
    reports: list[str] = []
    broken = _BrokenSink()
    sink = GuardedSink(broken, name="wandb", report=reports.append)
    for step in range(3):
        sink.log(step, {})
    sink.close()
    assert broken.calls == 1
    assert len(reports) == 1
    assert "wandb stopped working (BrokenPipeError: the service is gone)" in reports[0]


@pytest.mark.parametrize(
    ("module", "settings", "message"),
    [
        ("wandb", {"wandb": WandbConfig(mode="offline")}, r"longctx\[wandb\]"),
        ("torch.utils.tensorboard", {"tensorboard": True}, "pip install tensorboard"),
    ],
)
def test_missing_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, settings: dict[str, Any], message: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=message):
        _logger(tmp_path, **settings)


class _FakeRun:
    def __init__(self) -> None:
        self.points: list[tuple[int, dict[str, float]]] = []
        self.finished = False

    def log(self, metrics: dict[str, float], *, step: int) -> None:
        self.points.append((step, metrics))

    def finish(self) -> None:
        self.finished = True


class _FakeWandb:
    """Stands in for the wandb package; `error` is what init() raises in online mode."""

    class Settings:
        model_fields = ("silent", "init_timeout")

        def __init__(self, *, silent: bool, init_timeout: float) -> None:
            assert silent, "wandb would ask for a login on a terminal"
            assert init_timeout < 60

    def __init__(self, error: Exception | None) -> None:
        self.error = error
        self.inits: list[dict[str, Any]] = []
        self.was_set_up = False
        self.ids_in_use: set[str] = set()
        self.run = _FakeRun()

    def setup(self, settings: Any) -> None:
        self.was_set_up = True

    def init(self, **arguments: Any) -> _FakeRun:
        assert self.was_set_up, "wandb would ask for a login on a terminal"
        self.inits.append(arguments)
        if self.error is not None and arguments["mode"] == "online":
            self.ids_in_use.add(arguments["id"])  # the real service keeps it after a failure
            raise self.error
        assert arguments["id"] not in self.ids_in_use, f"run ID {arguments['id']} is in use"
        return self.run

    def teardown(self) -> None:
        self.was_set_up = False
        self.ids_in_use.clear()


def _fake_wandb(monkeypatch: pytest.MonkeyPatch, error: Exception | None = None) -> _FakeWandb:
    fake = _FakeWandb(error)
    monkeypatch.setattr(importlib, "import_module", lambda name: {"wandb": fake}[name])
    return fake


def test_wandb_keeps_its_id_over_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = _fake_wandb(monkeypatch)
    config = WandbConfig(mode="online", project="p", entity="e", tags=["t"])
    with _logger(tmp_path / "my_run", wandb=config, log_every=2) as logger:
        for step in range(1, 4):
            logger.log(step, {"loss": 1.0})
        logger.evaluation(3, {"held_out_loss": 2.0})
        state = logger.state()
    assert fake.run.points == [(1, {"loss": 1.0}), (2, {"loss": 1.0}), (3, {"held_out_loss": 2.0})]
    with _logger(tmp_path / "my_run", wandb=config, start_step=3, state=state):
        pass
    first, second = fake.inits
    assert first["id"] == second["id"] == state["wandb_run_id"]
    assert first["dir"] == str(tmp_path / "my_run")
    assert (first["name"], first["project"], first["entity"], first["tags"]) == ("my_run", "p", "e", ["t"])
    assert first["config"] == {"optim": {"lr": 0.1}}
    with _logger(tmp_path / "other", wandb=config) as logger:
        assert logger.state() != state


def test_wandb_without_login_says_how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fake_wandb(monkeypatch, RuntimeError("No API key configured. Use `wandb login` to log in."))
    with pytest.raises(ValueError, match=r"run `wandb login` once .* or set logger\.wandb\.mode=offline"):
        _logger(tmp_path, wandb=WandbConfig(mode="online"))
    # Also a run that is resumed: an account that is gone is for the user to mend.
    with pytest.raises(ValueError, match="wandb login"):
        _logger(tmp_path, wandb=WandbConfig(mode="online"), state={"wandb_run_id": "abc"})


def test_wandb_without_network_refuses_a_new_run_but_not_a_resumed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = _fake_wandb(monkeypatch, ConnectionError("no such host"))
    with pytest.raises(
        ValueError, match=r"wandb did not start \(ConnectionError: no such host\); other modes: offline"
    ):
        _logger(tmp_path, wandb=WandbConfig(mode="online"))
    with _logger(tmp_path, wandb=WandbConfig(mode="online"), state={"wandb_run_id": "abc"}) as logger:
        logger.log(1, {"loss": 1.0})
    assert [(init["mode"], init["id"]) for init in fake.inits[1:]] == [("online", "abc"), ("offline", "abc")]
    assert fake.run.points == [(1, {"loss": 1.0})]
    assert "goes on with logger.wandb.mode=offline under the same id abc" in capsys.readouterr().out


def test_real_wandb_offline_writes_below_the_run_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))  # or its own log goes to the user's cache
    sink = WandbSink(
        WandbConfig(mode="offline"),
        directory=tmp_path,
        run_id="abc123de",
        resumed=True,
        resolved_config={},
        report=print,
    )
    sink.log(1, {"loss": 1.0})
    sink.close()
    assert len(list(tmp_path.glob("wandb/offline-run-*-abc123de/run-abc123de.wandb"))) == 1


def test_real_tensorboard_writes_events(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with _logger(tmp_path, tensorboard=True) as logger:
        for step in range(1, 4):
            logger.log(step, {"loss": 3.0 - step})
    with _logger(tmp_path, tensorboard=True, start_step=1) as logger:
        logger.log(2, {"loss": 7.0})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 2.0), (2, 7.0)]


def test_yaml_holds_every_key_and_is_valid() -> None:
    values = yaml.safe_load((CONFIGS / "default.yaml").read_text())
    assert set(values) == {field.name for field in dataclasses.fields(LoggerConfig)}
    assert set(values["wandb"]) == {field.name for field in dataclasses.fields(WandbConfig)}
    schema = OmegaConf.structured(LoggerConfig)
    OmegaConf.set_readonly(schema.wandb, False)  # frozen dataclasses make read-only nodes
    config = OmegaConf.to_object(OmegaConf.merge(schema, values))
    assert isinstance(config, LoggerConfig)
    config.validate()
    assert config == LoggerConfig()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LoggerConfig(log_every=0), r"logger\.log_every=0"),
        (LoggerConfig(progress="fancy"), r"logger\.progress=fancy is unknown: take one of auto, bar, lines, off"),
        (LoggerConfig(progress="False"), "with quotes"),
        (LoggerConfig(wandb=WandbConfig(mode="on")), r"logger\.wandb\.mode=on is unknown: .* off, offline, online"),
        (LoggerConfig(wandb=WandbConfig(mode="offline", project="")), r"logger\.wandb\.project"),
        (LoggerConfig(peak_flops=0.0), r"logger\.peak_flops=0\.0"),
        (LoggerConfig(peak_flops=math.nan), r"logger\.peak_flops=nan"),
    ],
)
def test_bad_settings_are_refused_with_their_key(config: LoggerConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config.validate()
