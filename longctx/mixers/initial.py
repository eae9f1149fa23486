"""Initial values of the weights that only linear and sparse layers have."""

import math

import torch
from torch import Tensor

_RATES = (1.0, 16.0)  # exp(A_log), drawn uniformly
_STEPS = (1e-3, 0.1)  # softplus(dt_bias), drawn uniformly in logarithms


def mixer_weight(name: str, shape: torch.Size, *, generator: torch.Generator) -> Tensor | None:
    """Return the initial value of a parameter, float32; None for those that are initialised as any other matrix.

    Decays begin between 1 and 16 times 0.001 to 0.1 per token, as in Mamba-2; convolutions as PyTorch's own; Hedgehog's
    maps and landmarks with the identity; what SLA adds to softmax attention with 0.
    """
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "A_log":
        return torch.empty(shape).uniform_(*_RATES, generator=generator).log()
    if leaf == "dt_bias":
        step = torch.empty(shape).uniform_(*(math.log(step) for step in _STEPS), generator=generator).exp()
        return step + torch.log(-torch.expm1(-step))  # softplus of it is the step
    if leaf == "conv_weight":
        bound = shape[-1] ** -0.5
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)
    if leaf in ("query_weight", "key_weight", "landmark_weight"):
        return torch.eye(shape[-1]).expand(shape)
    if leaf == "rest_weight":
        return torch.zeros(shape)
    return None
