"""Initial values of the weights that only linear and sparse layers have.

Trainers draw them by name, as all weights, with `mixer_weight`. Modules begin with the same distributions, drawn from
PyTorch's own generator, so that they can be used in other models; their `nn.Linear`s, as PyTorch begins those.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

INIT_STD = 0.02  # of matrices, where no `model.init_std` says otherwise
_RATES = (1.0, 16.0)  # exp(A_log), drawn uniformly
_STEPS = (1e-3, 0.1)  # softplus(dt_bias), drawn uniformly in logarithms


def normal(shape: Sequence[int], *, std: float = INIT_STD, generator: torch.Generator | None = None) -> Tensor:
    """Return a matrix, or several, of the default dtype, on the default device: normal, with mean 0."""
    return torch.empty(tuple(shape)).normal_(0.0, std, generator=generator)


def taps(shape: Sequence[int], *, generator: torch.Generator | None = None) -> Tensor:
    """Return the weights `[C, k]` of a short convolution, likewise: uniform, as PyTorch's own."""
    bound = shape[-1] ** -0.5
    return torch.empty(tuple(shape)).uniform_(-bound, bound, generator=generator)


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
        return taps(shape, generator=generator)
    if leaf in ("query_weight", "key_weight", "landmark_weight"):
        return torch.eye(shape[-1]).expand(shape)
    if leaf == "rest_weight":
        return torch.zeros(shape)
    return None
