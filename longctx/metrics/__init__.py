"""Report on a run: console, metrics.jsonl, loss.png, TensorBoard, wandb, FLOPs and throughput.

Steps are indices from 0 everywhere in this package; only what people read counts finished steps ("step 12/60").
"""

from longctx.metrics.config import LoggerConfig, WandbConfig
from longctx.metrics.logger import MetricsLogger

__all__ = ["LoggerConfig", "MetricsLogger", "WandbConfig"]
