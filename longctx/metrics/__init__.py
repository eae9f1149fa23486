"""Report on a run: console, metrics.jsonl, loss.png, TensorBoard, wandb, FLOPs and throughput.

A step's number is how many optimizer steps are finished after it, 1 to the run's total, in everything that is written,
as in the names of checkpoints: the line of step 60 tells of the weights in iter_0000060.
"""

from longctx.metrics.config import LoggerConfig, WandbConfig

# Only the settings: importing the logger here would load the module that `python -m longctx.metrics.plot` runs.
__all__ = ["LoggerConfig", "WandbConfig"]
