"""Shard a batch for a Hugging Face causal language model: tokens, positions, and labels that are shifted first.

A Hugging Face model that is given `labels` shifts them by one within the tokens that it sees. On a shard the next token
in memory is another one than the next token of the sequence, so labels must be shifted on the whole sequence, before
it is sharded, and the loss must be a sum over all ranks divided by a count over all ranks.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longctx.kernels.positions import check_bounds
from longctx.loss import IGNORED
from longctx.parallel.layout import Layout


@dataclass(frozen=True)
class Shard:
    """One rank's part of a batch.

    Attributes:
        inputs: keyword arguments for the model: `input_ids` and `position_ids`, int64 `[B, T / cp]`, `use_cache=False`.
        labels: int64 `[B, T / cp]`, already shifted: label i belongs to logits i; `IGNORED` does not count.
        label_count: labels that count in the whole batch, the same on every rank that shares it.
    """

    inputs: dict[str, Any]
    labels: Tensor
    label_count: int


def shard_batch(
    input_ids: Tensor,
    labels: Tensor | None = None,
    *,
    layout: Layout,
    rank: int,
    cu_seqlens: Sequence[int] | Sequence[Sequence[int]] | None = None,
) -> Shard:
    """Return `rank`'s tokens of whole sequences, with positions and shifted labels.

    Positions count from the start of each document, as in Hugging Face's packed batches. Learned positions need that.
    RoPE depends on differences only, so positions in the sequence would do as well; but small angles are more exact in
    float32. The last token of a document has no label: the next one belongs to another document.

    Args:
        input_ids: int64 `[B, T]`, the whole sequences, the same on all ranks of the group; T a multiple of cp.
        labels: int64 `[B, T]` as Hugging Face has them, not shifted; `IGNORED` (-100) does not count. Default:
            `input_ids`.
        layout: which positions a rank owns.
        rank: this rank in the context-parallel group.
        cu_seqlens: document bounds from 0 to T: one for all rows, or one per row; None = each row is one document.
    """
    batch, total = input_ids.shape
    if labels is not None and labels.shape != input_ids.shape:
        raise ValueError(f"labels must be {tuple(input_ids.shape)} like input_ids; given {tuple(labels.shape)}")
    rows = rows_of(cu_seqlens) or ((0, total),)
    if len(rows) not in (1, batch):
        raise ValueError(f"need one cu_seqlens or one per row; given {len(rows)} for a batch of {batch}")
    positions = torch.stack([document_positions(bounds, total=total) for bounds in rows]).to(input_ids.device)
    positions = positions.expand(batch, total)
    shifted = torch.full_like(input_ids, IGNORED)
    shifted[:, :-1] = (input_ids if labels is None else labels)[:, 1:]
    shifted[:, :-1].masked_fill_(positions[:, 1:] == 0, IGNORED)
    inputs = {
        "input_ids": layout.shard(input_ids, rank=rank, dim=1),
        "position_ids": layout.shard(positions, rank=rank, dim=1),
        "use_cache": False,
    }
    return Shard(inputs, layout.shard(shifted, rank=rank, dim=1), int((shifted != IGNORED).sum()))


def document_positions(cu_seqlens: Sequence[int], *, total: int) -> Tensor:
    """Return each token's position counted from its document's start, int64 `[total]`."""
    check_bounds(cu_seqlens, total=total)
    bounds = torch.tensor(cu_seqlens, dtype=torch.int64)
    return torch.arange(total) - torch.repeat_interleave(bounds[:-1], bounds.diff())


def rows_of(cu_seqlens: Sequence[int] | Sequence[Sequence[int]] | None) -> tuple[tuple[int, ...], ...]:
    """Return document bounds as one tuple for all rows or one per row; () for None."""
    if cu_seqlens is None:
        return ()
    rows, shared = [], []
    for entry in cu_seqlens:
        try:
            shared.append(operator.index(entry))  # type: ignore[arg-type]
        except TypeError:
            rows.append(tuple(int(bound) for bound in entry))  # type: ignore[union-attr]
    if bool(rows) == bool(shared):
        raise ValueError(f"cu_seqlens must be numbers, or a list of numbers per row; given {cu_seqlens}")
    return tuple(rows) or (tuple(shared),)
