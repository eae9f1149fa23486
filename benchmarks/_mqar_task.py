"""Multi-query associative recall (MQAR; Zoology, arXiv:2312.04927): look up what was seen beside a key.

    k1 v1 k2 v2 ... kn vn  .  k2 .  .  .  kn .  k1 ...      L tokens; label of a query k_j: v_j; everything else: none

Keys are distinct, from 1 ... V/2 - 1; values are distinct, from V/2 ... V - 1; the filler is 0. What follows the pairs
is slots of two tokens. Each key is asked for once, in the first token of a slot; the slots are drawn without
replacement, key after key, slot i (from 1) with a probability proportional to a i^(a - 1), a = 0.01: many keys are
asked for soon, some late.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from longctx.loss import IGNORED

POWER = 0.01


@dataclass(frozen=True)
class Task:
    """One size of the task.

    Attributes:
        tokens: L.
        pairs: n, key-value pairs of a sequence.
        vocabulary: V, filler included.
    """

    tokens: int
    pairs: int
    vocabulary: int

    def __post_init__(self) -> None:
        if self.tokens % 2 or not 1 <= 4 * self.pairs <= self.tokens:
            raise ValueError(f"tokens must be even and at least 4 x pairs; given {self.tokens} and {self.pairs} pairs")
        if self.pairs > self.vocabulary // 2 - 1:
            raise ValueError(f"{self.pairs} pairs need a vocabulary >= {2 * self.pairs + 2}; given {self.vocabulary}")

    def draw(self, count: int, *, seed: int) -> tuple[Tensor, Tensor]:
        """Return sequences and labels, int64 `[count, L]`; the same for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        pairs, half = self.pairs, self.vocabulary // 2
        keys = 1 + _distinct(torch.ones(half - 1), pairs, count, generator)
        values = half + _distinct(torch.ones(self.vocabulary - half), pairs, count, generator)
        slots = (self.tokens - 2 * pairs) // 2
        likely = torch.arange(1, slots + 1, dtype=torch.float64) ** (POWER - 1)
        asked = 2 * pairs + 2 * _distinct(likely, pairs, count, generator)
        sequences = torch.zeros(count, self.tokens, dtype=torch.int64)
        sequences[:, 0 : 2 * pairs : 2] = keys
        sequences[:, 1 : 2 * pairs : 2] = values
        sequences.scatter_(1, asked, keys)
        labels = torch.full_like(sequences, IGNORED).scatter_(1, asked, values)
        return sequences, labels


def _distinct(weights: Tensor, size: int, rows: int, generator: torch.Generator) -> Tensor:
    """Return `[rows, size]` indices drawn one after the other without replacement, in proportion to the weights."""
    clocks = torch.empty(rows, len(weights), dtype=torch.float64).exponential_(generator=generator) / weights
    return clocks.topk(size, largest=False, sorted=True).indices  # who rings first is drawn first


def reach_bound(sequences: Tensor, labels: Tensor, *, pairs: int, window: int, taps: int) -> float:
    """Return the share of queries whose pair a window can see behind a convolution: no mask that holds lets more.

    A query sees the features of `window` tokens, each made of its own and the `taps - 1` tokens before it.
    """
    rows, asked = (labels != IGNORED).nonzero(as_tuple=True)
    keys = sequences[:, 0 : 2 * pairs : 2]
    pair = (keys[rows] == sequences[rows, asked][:, None]).int().argmax(dim=1)
    return (asked - 2 * pair < window + taps - 1).double().mean().item()
