"""Segments and the documents in them as sequences one after the other, for kernels that know `cu_seqlens` only."""

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from longctx.kernels.linear.contract import Cuts


@dataclass(frozen=True, eq=False, kw_only=True)
class Sequences:
    """N sequences: what is in one document, one segment and one row.

    Attributes:
        count: N.
        cu_seqlens: int64 `[N + 1]`, their bounds among the B T tokens of all rows. None = they all have one length:
            then they are the rows of a batch of N.
        first, last: int64 `[B, P]`, the numbers of each segment's first and last sequence.
        continued: bool `[B, P]`, whether the state that enters a segment is used.
        whole: bool `[B, P]`, whether it also leaves the segment: no document begins in it.
    """

    count: int
    cu_seqlens: Tensor | None
    first: Tensor
    last: Tensor
    continued: Tensor
    whole: Tensor

    def flat(self, x: Tensor) -> Tensor:
        """Return `[B, T, ...]` as `[1, B T, ...]` with `cu_seqlens`, as `[N, B T / N, ...]` without."""
        return x.reshape(self.count if self.cu_seqlens is None else 1, -1, *x.shape[2:])

    def enter(self, states: Tensor) -> Tensor:
        """Return what enters each sequence `[N, H, K, V]`, given what enters each segment `[B, P, H, K, V]`."""
        states = torch.where(self.continued[:, :, None, None, None], states, 0.0).flatten(0, 1)
        nothing = states.new_zeros(self.count, *states.shape[1:])
        return nothing.index_copy(0, self.first.flatten(), states)

    def leave(self, states: Tensor, *, rows: int) -> Tensor:
        """Return what leaves each segment `[B, P, H, K, V]`, given what leaves each sequence `[N, H, K, V]`."""
        return states[self.last.flatten()].unflatten(0, (rows, -1))


_RECENT: deque[tuple[Cuts, int, torch.device, Sequences]] = deque(maxlen=4)


def sequences(cuts: Cuts, *, rows: int, device: torch.device) -> Sequences:
    """Return the sequences of a batch of `rows`.

    With documents, to count them waits for the device: the layers of a model, which share their cuts, wait once.
    """
    for known, known_rows, known_device, found in _RECENT:
        if known is cuts and (known_rows, known_device) == (rows, device):
            return found
    made = _sequences(cuts, rows, device)
    _RECENT.append((cuts, rows, device, made))
    return made


def _sequences(cuts: Cuts, rows: int, device: torch.device) -> Sequences:
    segments = len(cuts.lengths)
    bounds = torch.tensor(cuts.bounds)
    begins = torch.zeros(rows, cuts.tokens, dtype=torch.bool)
    begins[:, bounds[:-1]] = True
    continued = torch.ones(rows, segments, dtype=torch.bool)
    if cuts.documents is not None and cuts.before is not None:
        documents = cuts.documents.cpu()
        begins[:, 1:] |= documents[:, 1:] != documents[:, :-1]
        continued &= cuts.before.cpu() == documents[:, bounds[:-1]]
    number = begins.flatten().cumsum(0).view(rows, -1) - 1
    first, last = number[:, bounds[:-1]], number[:, bounds[1:] - 1]
    count = int(number[-1, -1]) + 1
    starts = begins.flatten().nonzero().flatten()
    cu_seqlens = torch.cat([starts, torch.tensor([rows * cuts.tokens])])
    alike = len(set(cu_seqlens.diff().tolist())) == 1
    return Sequences(
        count=count,
        cu_seqlens=None if alike else cu_seqlens.to(device),
        first=first.to(device),
        last=last.to(device),
        continued=continued.to(device),
        whole=(continued & (first == last)).to(device),
    )
