"""Engines by the names that config uses."""

import torch

from longctx.engines.engine import Engine, EngineConfig
from longctx.engines.native import NativeEngine
from longctx.optim import OptimConfig
from longctx.parallel.mesh import Degrees
from longctx.stack import Stack


def build_engine(
    config: EngineConfig,
    *,
    optim: OptimConfig,
    stack: Stack,
    degrees: Degrees,
    device: torch.device,
    seed: int,
) -> Engine:
    """Return the engine called `config.name`, with initial weights that depend on `seed` alone (collective)."""
    engines = {"native": NativeEngine}
    return engines[config.name](config=config, optim=optim, stack=stack, degrees=degrees, device=device, seed=seed)
