"""What an engine is: the owner of parameters, gradients and optimizer state.

The loop, the data, the attention and the evaluation are the same under every engine.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from longctx.batch import MicroBatch

ENGINES = ("native",)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
PARAMETERS = ("replicate", "shard")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Which engine, and how it keeps the parameters.

    Attributes:
        name: `native` (FSDP2 over a device mesh).
        parameters: `replicate` (every rank has all of them) or `shard` (FSDP2 over dp_shard x cp).
        dtype: arithmetic of the forward and backward: `float32`, `bfloat16` (with float32 parameters, gradient sums and
            optimizer state), or `float64` (everything; to verify).
    """

    name: str = "native"
    parameters: str = "replicate"
    dtype: str = "float32"

    def validate(self) -> None:
        """Refuse unknown names."""
        for key, value, known in (
            ("name", self.name, ENGINES),
            ("parameters", self.parameters, PARAMETERS),
            ("dtype", self.dtype, tuple(DTYPES)),
        ):
            if value not in known:
                raise ValueError(f"engine.{key}={value} is not known; known are {', '.join(known)}")


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did, equal on every rank.

    Attributes:
        loss: (sum of token losses) / (count of labels) over the whole global batch.
        grad_norm: true global norm before clipping.
        num_labels: labels that counted.
        visible_pairs: (query, key) pairs of all sequences of the step.
        added_loss: what layers want minimised besides, over the count of labels; not in `loss`.
    """

    loss: float
    grad_norm: float
    num_labels: int
    visible_pairs: int
    added_loss: float = 0.0


class Engine(Protocol):
    """Train, evaluate, and hand over the state."""

    @property
    def num_parameters(self) -> int:
        """Return the number of parameters of the whole model."""
        ...

    def train_step(self, micro_batches: Sequence[MicroBatch], *, lr: float) -> StepResult:
        """Run forward and backward on every micro-batch and one optimizer step (collective)."""
        ...

    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> float:
        """Return the mean token loss over all ranks' micro-batches (collective; equally many on each rank)."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return model and optimizer state for torch DCP, sharded as it lies; the same keys under any mesh."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the state back after DCP filled it in."""
        ...
