"""The gates of a recurrence: log decays g <= 0 and the delta rule's beta, computed in at least float32.

| decay         | g, one for each         | formula                                                               |
|---------------|-------------------------|-----------------------------------------------------------------------|
| `none`        |                         |                                                                       |
| `lightning`   | head                    | -2^(-8 (h + 1) / H) (1 - l / (L - 1) + 1e-5) (MiniMax-01, 2501.08313) |
| `transnormer` | head                    | -8 h / H (1 - l / L) (TransNormerLLM, 2307.14995)                     |
| `retention`   | head                    | log(1 - 2^(-5 - h)) (RetNet, 2307.08621)                              |
| `mamba2`      | token and head          | -exp(A) softplus(W x + b) (2405.21060; gated DeltaNet, 2412.06464)    |
| `gla`         | token, head and key dim | log sigmoid(W2 W1 x + b) / 16 (2312.06635)                            |
| `regla`       | token, head and key dim | log(f (f + 2 r (1 - f))) / 16, f and r sigmoids (ReGLA, 2502.01578)   |
| `kda`         | token, head and key dim | -exp(A) softplus(W2 W1 x + b), A per head (Kimi Linear, 2510.26692)   |

h of H is the head, l of L the layer, all counted from 0. beta is sigmoid(W x), one for each token and head.

Decays multiply up over thousands of tokens, so none of this is ever 16-bit: an engine that lowers the precision of
parameters leaves those of `Transition` as they are.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longctx.kernels.linear.contract import Gate, state_dtype
from longctx.kernels.precision import without_autocast

# The shape of each decay.
DECAYS: dict[str, Gate] = {
    "none": "none",
    "lightning": "fixed",
    "transnormer": "fixed",
    "retention": "fixed",
    "mamba2": "scalar",
    "gla": "diagonal",
    "regla": "diagonal",
    "kda": "diagonal",
}
_RANK = 16  # of W2 W1 in GLA and ReGLA
_TEMPERATURE = 16.0  # divides their log decays, so that a gate that is half open still remembers for tens of tokens


class Gates(NamedTuple):
    """Log decays (None, `[H]`, `[B, T, H]` or `[B, T, H, K]`) and beta (None or `[B, T, H]`), float32 or float64."""

    g: Tensor | None
    beta: Tensor | None


class Transition(nn.Module):
    """From tokens `[B, T, dim]` to their gates."""

    def __init__(
        self, *, decay: str, rule: str, dim: int, heads: int, key_dim: int, layer: int, num_layers: int
    ) -> None:
        super().__init__()
        self.decay, self.heads, self.layer, self.num_layers = decay, heads, layer, num_layers
        diagonal = DECAYS[decay] == "diagonal"
        if decay == "mamba2":
            self.a_proj = nn.Linear(dim, heads, bias=False)
        if diagonal:
            rank = key_dim if decay == "kda" else _RANK
            self.down = nn.Linear(dim, rank, bias=False)
            self.up = nn.Linear(rank, heads * key_dim, bias=decay != "kda")
        if decay == "regla":
            self.refine = nn.Linear(rank, heads * key_dim)
        if decay in ("mamba2", "kda"):
            self.A_log = nn.Parameter(torch.zeros(heads))
            self.dt_bias = nn.Parameter(torch.zeros(heads * key_dim if diagonal else heads))
        self.b_proj = nn.Linear(dim, heads, bias=False) if rule == "delta" else None

    @without_autocast
    def forward(self, x: Tensor) -> Gates:
        x = x.to(state_dtype(x))
        beta = None if self.b_proj is None else _wide(self.b_proj, x).sigmoid()
        return Gates(self._log_decay(x), beta)

    def _log_decay(self, x: Tensor) -> Tensor | None:
        if DECAYS[self.decay] == "none":
            return None
        if DECAYS[self.decay] == "fixed":
            return fixed_decay(self.decay, self.heads, self.layer, self.num_layers, x.dtype, x.device)
        if self.decay == "mamba2":
            return -self.A_log.to(x).exp() * F.softplus(_wide(self.a_proj, x) + self.dt_bias.to(x))
        low = _wide(self.down, x)
        raw = _wide(self.up, low)
        if self.decay == "kda":
            step = F.softplus(raw + self.dt_bias.to(x)).unflatten(-1, (self.heads, -1))
            return -self.A_log.to(x).exp()[:, None] * step
        log = F.logsigmoid(raw)
        if self.decay == "regla":  # in logarithms, where f or 1 - f may be tiny
            refined = math.log(2.0) + F.logsigmoid(_wide(self.refine, low)) + F.logsigmoid(-raw)
            log = (log + torch.logaddexp(log, refined)).clamp(max=0.0)  # rounding: f (f + 2 r (1 - f)) <= 1
        return (log / _TEMPERATURE).unflatten(-1, (self.heads, -1))


@lru_cache(maxsize=256)  # made on the host once, not in every forward
def fixed_decay(
    decay: str, heads: int, layer: int, num_layers: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return the log decays `[H]` of a layer that does not learn them."""
    if decay == "lightning":
        depth = 1 - layer / max(num_layers - 1, 1) + 1e-5
        logs = [-(2 ** (-8 * (head + 1) / heads)) * depth for head in range(heads)]
    elif decay == "transnormer":
        logs = [-8 * head / heads * (1 - layer / num_layers) for head in range(heads)]
    else:
        logs = [math.log1p(-(2.0 ** (-5 - head))) for head in range(heads)]
    return torch.tensor(logs, dtype=dtype, device=device)


def _wide(linear: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, linear.weight.to(x), None if linear.bias is None else linear.bias.to(x))
