"""From samples of the stream to what one rank computes on: the layout applied to tokens, labels and positions."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from longctx.attention import ContextParallelAttention
from longctx.attention_config import AttentionConfig
from longctx.data.batches import sample_indices
from longctx.data.stream import PackedStream, Sample
from longctx.loss import IGNORED
from longctx.parallel.balance import visible_pairs
from longctx.parallel.plan import Plan


@dataclass(frozen=True)
class MicroBatch:
    """This rank's shard of a few sequences.

    Attributes:
        tokens, labels: int64 `[B, T / cp]`; labels were shifted before sharding.
        positions: int64 `[T / cp]`, global positions of this rank's tokens.
        plan: what this rank computes at each hop.
        num_labels: labels that count, in this rank's shard.
        visible_pairs: (query, key) pairs of the whole sequences on cp rank 0, 0 on the others: a sum over ranks
            counts each sequence once.
    """

    tokens: Tensor
    labels: Tensor
    positions: Tensor
    plan: Plan
    num_labels: int
    visible_pairs: int


def shard_samples(
    samples: Sequence[Sample],
    *,
    attention: ContextParallelAttention,
    config: AttentionConfig,
    device: torch.device,
    count_labels: bool = True,
) -> MicroBatch:
    """Give this rank its tokens of `samples`, which all ranks of the context-parallel group read alike.

    Args:
        count_labels: False makes a filler, whose labels are all ignored, for ranks that have run out of samples.
    """
    rank, layout = attention.transport.rank, attention.layout
    tokens = torch.from_numpy(np.stack([sample.tokens for sample in samples]))
    labels = torch.from_numpy(np.stack([sample.labels for sample in samples]))  # a copy
    total = tokens.shape[1]
    masks = [config.mask(sample.cu_seqlens) for sample in samples]
    for row, sample in zip(labels, samples, strict=True):
        config.hide_visible_labels(row, sample.cu_seqlens)
    labels = layout.shard(labels, rank=rank, dim=1)
    if not count_labels:
        labels = torch.full_like(labels, IGNORED)
    return MicroBatch(
        tokens=layout.shard(tokens, rank=rank, dim=1).to(device),
        labels=labels.to(device),
        positions=layout.positions(rank, total).to(device),
        plan=attention.plan(masks, total=total),
        num_labels=int((labels != IGNORED).sum()),
        visible_pairs=sum(visible_pairs(mask, total=total) for mask in masks) if count_labels and rank == 0 else 0,
    )


@dataclass(frozen=True)
class BatchSource:
    """Every step's micro-batches of one rank. Which samples a step has depends on neither dp, cp nor accumulation."""

    attention: ContextParallelAttention
    config: AttentionConfig
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
        return [self._shard([stream.sample(index) for index in indices]) for indices in rows]

    def evaluation(self, stream: PackedStream, indices: Sequence[int]) -> list[MicroBatch]:
        """Return this rank's share of the samples, one per micro-batch, as many micro-batches on every rank.

        Ranks that run out get a filler without labels: all must take part in the collectives of every forward.
        """
        batches = []
        for first in range(0, len(indices), self.dp_size):
            own = first + self.dp_rank
            sample = stream.sample(indices[min(own, len(indices) - 1)])
            batches.append(self._shard([sample], count_labels=own < len(indices)))
        return batches

    def _shard(self, samples: Sequence[Sample], *, count_labels: bool = True) -> MicroBatch:
        return shard_samples(
            samples,
            attention=self.attention,
            config=self.config,
            device=self.device,
            count_labels=count_labels,
        )
