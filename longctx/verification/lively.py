"""Parameters that all matter, for checks: those of a model that begins would hide what is lost."""

import torch
from torch import nn

from longctx.model import ModelConfig, initial_weight


@torch.no_grad()
def enliven(module: nn.Module, config: ModelConfig) -> None:
    """Fill a float64 module: scores of order 1, norms and sinks unlike each other, and decays so slow that no token is
    forgotten. By the names of its parameters, so alike on all ranks."""
    for name, parameter in module.named_parameters():
        value = initial_weight(name, parameter.shape, config=config, seed=5).double()
        generator = torch.Generator().manual_seed(sum(map(ord, name)))
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if name.endswith("A_log"):
            parameter.copy_(0.3 * noise - 6.0)
        elif parameter.dim() == 1:
            parameter.copy_(value + 0.3 * noise)
        else:
            parameter.copy_(noise / parameter.shape[-1] ** 0.5)
