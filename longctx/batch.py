"""From samples of the stream to what one rank computes on: the layout applied to tokens, labels and positions."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from longctx.data.batches import sample_indices
from longctx.data.stream import PackedStream, Sample
from longctx.loss import IGNORED
from longctx.stack import Stack, StackPlan


@dataclass(frozen=True)
class MicroBatch:
    """This rank's shard of a few sequences.

    Attributes:
        tokens: int64 `[B, T / cp]`, in the layout of the first layer.
        labels: likewise, in the layout of the last one; they were shifted before sharding.
        plan: what this rank computes in every layer.
        num_labels: labels that count, in this rank's shard.
        visible_pairs: (query, key) pairs of the whole sequences, summed over the softmax layers, on cp rank 0, and 0 on
            the others: a sum over ranks counts each sequence once.
    """

    tokens: Tensor
    labels: Tensor
    plan: StackPlan
    num_labels: int
    visible_pairs: int


def shard_samples(
    samples: Sequence[Sample], *, stack: Stack, device: torch.device, step: int = 0, count_labels: bool = True
) -> MicroBatch:
    """Give this rank its tokens of `samples`, which all ranks of the context-parallel group read alike.

    Args:
        step: optimizer steps before this one.
        count_labels: False makes a filler, whose labels are all ignored, for ranks that have run out of samples.
    """
    rank = stack.transport.rank
    tokens = torch.from_numpy(np.stack([sample.tokens for sample in samples]))
    labels = torch.from_numpy(np.stack([sample.labels for sample in samples]))  # a copy
    total = tokens.shape[1]
    bounds = [sample.cu_seqlens for sample in samples]
    for row, each in zip(labels, bounds, strict=True):
        stack.config.hide_visible_labels(row, each)
    labels = stack.last.shard(labels, rank=rank, dim=1)
    if not count_labels:
        labels = torch.full_like(labels, IGNORED)
    counts = count_labels and rank == 0
    return MicroBatch(
        tokens=stack.first.shard(tokens, rank=rank, dim=1).to(device),
        labels=labels.to(device),
        plan=stack.plan(bounds, total=total, device=device, step=step),
        num_labels=int((labels != IGNORED).sum()),
        visible_pairs=sum(stack.visible_pairs(each, total=total) for each in bounds) if counts else 0,
    )


@dataclass(frozen=True)
class BatchSource:
    """Every step's micro-batches of one rank. Which samples a step has depends on neither dp, cp nor accumulation."""

    stack: Stack
    device: torch.device
    global_batch: int
    micro_batch: int
    dp_rank: int
    dp_size: int

    def training(self, stream: PackedStream, step: int) -> list[MicroBatch]:
        """Return this rank's micro-batches of an optimizer step (counted from 0)."""
        rows = sample_indices(
            step,
            global_batch=self.global_batch,
            micro_batch=self.micro_batch,
            dp_rank=self.dp_rank,
            dp_size=self.dp_size,
        )
        return [self._shard([stream.sample(index) for index in indices], step=step) for indices in rows]

    def evaluation(self, stream: PackedStream, indices: Sequence[int], *, step: int) -> list[MicroBatch]:
        """Return this rank's share of the samples, one per micro-batch, as many micro-batches on every rank.

        `step` is the number of optimizer steps before the evaluation.

        Ranks that run out get a filler without labels: all must take part in the collectives of every forward.
        """
        batches = []
        for first in range(0, len(indices), self.dp_size):
            own = first + self.dp_rank
            sample = stream.sample(indices[min(own, len(indices) - 1)])
            batches.append(self._shard([sample], step=step, count_labels=own < len(indices)))
        return batches

    def _shard(self, samples: Sequence[Sample], *, step: int, count_labels: bool = True) -> MicroBatch:
        return shard_samples(samples, stack=self.stack, device=self.device, step=step, count_labels=count_labels)
