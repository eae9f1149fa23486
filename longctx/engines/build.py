"""Engines by the names that config uses."""

import torch

from longctx.attention import ContextParallelAttention
from longctx.engines.engine import Engine, EngineConfig
from longctx.engines.native import NativeEngine
from longctx.model import ModelConfig
from longctx.optim import OptimConfig
from longctx.parallel.mesh import Degrees


def build_engine(
    config: EngineConfig,
    *,
    model: ModelConfig,
    optim: OptimConfig,
    attention: ContextParallelAttention,
    degrees: Degrees,
    device: torch.device,
    seed: int,
) -> Engine:
    """Return the engine called `config.name`, with initial weights that depend on `seed` alone (collective)."""
    engines = {"native": NativeEngine}
    return engines[config.name](
        config=config, model=model, optim=optim, attention=attention, degrees=degrees, device=device, seed=seed
    )
