"""When checkpoints are written, how many are kept, and where a run continues from."""

from __future__ import annotations

from dataclasses import dataclass

MODES = ("async", "sync")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Describe the `checkpoint` group of the configuration.

    Attributes:
        every: optimizer steps between two checkpoints; 0 writes one at the end of the run only.
        keep_last: how many complete checkpoints stay on disk; older ones are removed after a newer one is published.
        resume: "auto" continues from the newest complete checkpoint of the run directory, "never" starts anew, anything
            else is the path of one checkpoint directory (`.../iter_0000040`) or of a run directory.
        mode: "async" copies the state to host memory and writes it while training goes on; "sync" writes in place,
            which needs no second copy of the state in memory.
    """

    every: int = 100
    keep_last: int = 2
    resume: str = "auto"
    mode: str = "async"

    def validate(self) -> None:
        """Check the values; raise ValueError naming the key."""
        if self.every < 0:
            raise ValueError(
                f"checkpoint.every is {self.every}: need a number of steps >= 1, or 0 for one checkpoint at the end"
            )
        if self.keep_last < 1:
            raise ValueError(f"checkpoint.keep_last is {self.keep_last}: at least 1 checkpoint has to be kept")
        if not self.resume.strip():
            raise ValueError(
                "checkpoint.resume is empty: need 'auto', 'never', or the path of a checkpoint or run directory"
            )
        if self.mode not in MODES:
            raise ValueError(f"checkpoint.mode is {self.mode!r}: need one of {', '.join(MODES)}")
