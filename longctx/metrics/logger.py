"""Hand a run's numbers to everything that reports on it. Only rank 0 reports."""

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from longctx.metrics.config import LoggerConfig
from longctx.metrics.jsonl import JsonlWriter
from longctx.metrics.meter import Eta, Smoothed
from longctx.metrics.plot import LossCurve
from longctx.metrics.progress import Progress, SilentProgress, Status, make_progress
from longctx.metrics.sink import GuardedSink
from longctx.metrics.tensorboard import TensorBoardSink
from longctx.metrics.wandb import WandbSink, new_run_id


class MetricsLogger:
    """Report on a run: console, `metrics.jsonl`, `loss.png`, and TensorBoard and wandb where they are asked for.

    On every rank but 0 all methods do nothing. A step's number is how many optimizer steps are finished after it.
    `start_step` is that of the checkpoint that the run continues from (0 without one); what an earlier process logged
    of later steps is dropped.
    """

    def __init__(
        self,
        config: LoggerConfig,
        *,
        run_dir: Path,
        rank: int,
        total_steps: int,
        start_step: int,
        resolved_config: Mapping[str, Any],
        state: Mapping[str, Any] | None,
    ) -> None:
        """Open everything. `state` is what `state()` returned before the checkpoint that the run continues from.

        Raise ValueError, with the config key, for what cannot work (a package missing, wandb without a login, a run
        directory that cannot be written); after this, errors are reported once and never stop the run.
        """
        self._config = config
        self._run_dir = run_dir
        self._total_steps = total_steps
        self._start_step = start_step
        self._curve = LossCurve(run_dir, report=self.message)
        self._closed = False
        self._sinks: list[GuardedSink] = []
        self._jsonl: JsonlWriter | None = None
        self._progress: Progress = SilentProgress()
        self._eta = Eta(total_steps=total_steps)
        self._speed = Smoothed()
        saved_id = (state or {}).get("wandb_run_id")
        self._wandb_run_id: str | None = saved_id
        if rank != 0:
            return

        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            self._jsonl = JsonlWriter(run_dir / "metrics.jsonl", start_step=start_step, report=self.message)
        except OSError as error:
            raise ValueError(f"the run directory {run_dir} cannot be written: {error}") from error
        try:
            self._open_sinks(resolved_config, resumed=saved_id is not None)
            # Last, so that nothing above is printed into the bar.
            self._progress = make_progress(config.progress, total_steps=total_steps, start_step=start_step)
        except BaseException:
            self._close_files()
            raise
        if self._jsonl.dropped:
            self.message(
                f"metrics.jsonl: dropped {self._jsonl.dropped} line(s) of steps after {start_step}, or cut off, "
                "which are written again"
            )

    def _open_sinks(self, resolved_config: Mapping[str, Any], *, resumed: bool) -> None:
        if self._config.tensorboard:
            tensorboard = TensorBoardSink(self._run_dir / "tensorboard", start_step=self._start_step)
            self._sinks.append(GuardedSink(tensorboard, name="TensorBoard", report=self.message))
        if self._config.wandb.mode != "off":
            self._wandb_run_id = self._wandb_run_id or new_run_id()
            wandb = WandbSink(
                self._config.wandb,
                directory=self._run_dir,
                run_id=self._wandb_run_id,
                resumed=resumed,
                resolved_config=resolved_config,
                report=print,
            )
            self._sinks.append(GuardedSink(wandb, name="wandb", report=self.message))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Report the training metrics of a step that was just made: `start_step` < `step` <= `total_steps`."""
        if self._jsonl is None or self._closed:
            return
        assert self._start_step < step <= self._total_steps, f"{self._start_step} < {step} <= {self._total_steps}"
        self._jsonl.write({"step": step, **metrics})
        due = step % self._config.log_every == 0 or step in (self._start_step + 1, self._total_steps)
        if due:
            for sink in self._sinks:
                sink.log(step, metrics)
        speed = metrics.get("tokens_per_second")
        status = Status(
            step=step,
            loss=metrics.get("loss"),
            tokens_per_second=None if speed is None else self._speed.add(speed),
            eta_seconds=self._eta.update(step, step_seconds=metrics.get("step_seconds")),
        )
        self._progress.update(status, due=due)

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Report metrics of the weights after `step`, e.g. `held_out_loss`, on a line of their own.

        Log the step itself first: wandb takes no step lower than its last.
        """
        if self._jsonl is None or self._closed:
            return
        self._jsonl.write({"step": step, **metrics})
        for sink in self._sinks:
            sink.log(step, metrics)
        numbers = "  ".join(
            f"{key.replace('held_out', 'held-out').replace('_', ' ')} {value:.4g}" for key, value in metrics.items()
        )
        self.message(f"step {step}/{self._total_steps}  {numbers}")
        self._curve.draw_if_due()

    def message(self, text: str) -> None:
        """Print `text` without breaking the bar."""
        self._progress.message(text)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint has to hold. Only rank 0's is complete; the keys are the same on every rank."""
        return {"wandb_run_id": self._wandb_run_id}

    def close(self) -> None:
        """Draw loss.png, flush and close everything. May be called twice; raises nothing but a second interrupt."""
        if self._closed or self._jsonl is None:
            return
        self._closed = True
        try:
            self._progress.close()
            self._curve.draw()
        finally:
            self._close_files()

    def _close_files(self) -> None:
        for sink in self._sinks:
            sink.close()
        if self._jsonl is not None:
            self._jsonl.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
