"""Checkpoints: written in the background, published atomically, found again, loaded on any number of ranks."""

from longctx.checkpoint.checkpointer import Checkpointer
from longctx.checkpoint.compare import compare_models
from longctx.checkpoint.config import CheckpointConfig
from longctx.checkpoint.integrity import read_extra
from longctx.checkpoint.rng import reseed, restore_rng, rng_state
from longctx.checkpoint.version import code_version

__all__ = [
    "CheckpointConfig",
    "Checkpointer",
    "code_version",
    "compare_models",
    "read_extra",
    "reseed",
    "restore_rng",
    "rng_state",
]
