"""Say where a run's numbers go."""

import math
from dataclasses import dataclass, field

WANDB_MODES = ("off", "offline", "online")
PROGRESS_KINDS = ("auto", "bar", "lines", "off")


@dataclass(frozen=True, kw_only=True)
class WandbConfig:
    """Settings of Weights & Biases. "offline" needs neither an account nor a network."""

    mode: str = "off"
    project: str = "longctx"
    name: str | None = None
    entity: str | None = None
    tags: list[str] = field(default_factory=list)

    def validate(self) -> None:
        """Raise ValueError, naming the config key, for a value that cannot be used."""
        _one_of("logger.wandb.mode", self.mode, WANDB_MODES)
        if self.mode != "off" and not self.project:
            raise ValueError("logger.wandb.project is empty: give the name of the project that the run belongs to")


@dataclass(frozen=True, kw_only=True)
class LoggerConfig:
    """Settings of everything that reports on a run. `metrics.jsonl` and `loss.png` are always written.

    `debug` adds lines at debug level to the console, such as which kernel computes each hop (rank 0).
    `log_every` is the number of steps between two lines on the console and two points in TensorBoard and wandb;
    `metrics.jsonl` and the progress bar get every step. `peak_flops`, in FLOP/s of one device, overrides what MFU is
    a share of.
    """

    wandb: WandbConfig = field(default_factory=WandbConfig)
    tensorboard: bool = False
    debug: bool = False
    log_every: int = 1
    progress: str = "auto"
    peak_flops: float | None = None

    def validate(self) -> None:
        """Raise ValueError, naming the config key, for a value that cannot be used."""
        self.wandb.validate()
        _one_of("logger.progress", self.progress, PROGRESS_KINDS)
        if self.log_every < 1:
            raise ValueError(f"logger.log_every={self.log_every} cannot be used: a number of steps >= 1 is needed")
        if self.peak_flops is not None and not (math.isfinite(self.peak_flops) and self.peak_flops > 0):
            raise ValueError(
                f"logger.peak_flops={self.peak_flops} cannot be used: a number of FLOP/s > 0 is needed, or null to "
                "look the device up"
            )


def _one_of(key: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        # An unquoted `off` is the boolean false to YAML 1.1, which a string field turns into the text "False".
        hint = '; write "off" with quotes in YAML' if value in ("False", "false") else ""
        raise ValueError(f"{key}={value} is unknown: take one of {', '.join(known)}{hint}")
