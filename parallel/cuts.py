"""Where one rank's tokens are cut: into runs of consecutive positions, and into documents."""

from collections.abc import Sequence

import torch
from torch import Tensor

from longctx.kernels.linear.contract import Cuts
from longctx.kernels.positions import check_bounds
from longctx.parallel.chain import runs
from longctx.parallel.layout import Layout

Bounds = Sequence[int]


def cuts(
    layout: Layout, *, rank: int, total: int, bounds: Sequence[Bounds] | None, device: torch.device | None
) -> Cuts:
    """Return the cuts of a rank's tokens.

    Args:
        total: tokens of the whole sequence.
        bounds: `cu_seqlens` of the packed documents, one for all rows of a batch or one per row; None = not packed.
        device: of the tokens.

    Returns:
        Documents are numbered alike on all ranks: from 0, in the order of the sequence. There are none if every row is
        one document.

    Raises:
        ValueError: no `cu_seqlens`, or one that does not go strictly upwards from 0 to `total`.
    """
    segments = runs(layout, rank, total)
    lengths = tuple(segment.count for segment in segments)
    if not _packed(bounds, total):
        return Cuts(lengths=lengths)
    positions = layout.positions(rank, total)
    before = torch.tensor([max(segment.start - 1, 0) for segment in segments])
    assert bounds is not None
    return Cuts(
        lengths=lengths,
        documents=_documents(positions, bounds).to(device),
        before=_documents(before, bounds).to(device),
    )


def extended_documents(
    layout: Layout,
    *,
    rank: int,
    total: int,
    bounds: Sequence[Bounds] | None,
    reach: int,
    device: torch.device | None,
) -> Tensor | None:
    """Return the documents of a rank's tokens with the `reach` tokens before each run, in the order of `extend`.

    Returns:
        int32 `[R, E]`, numbered as those of `cuts`, -1 before the sequence begins; None if every row is one document.
    """
    if not _packed(bounds, total):
        return None
    assert bounds is not None
    return _documents(extended_positions(layout, rank=rank, total=total, reach=reach), bounds).to(device)


def extended_positions(layout: Layout, *, rank: int, total: int, reach: int) -> Tensor:
    """Return the positions of a rank's runs, each with the `reach` ones before it: int64 `[E]`, from `-reach` on."""
    parts = [torch.arange(run.start - reach, run.last + 1) for run in runs(layout, rank, total)]
    return torch.cat(parts)


def _packed(bounds: Sequence[Bounds] | None, total: int) -> bool:
    if bounds is None:
        return False
    if not bounds:
        raise ValueError("need one cu_seqlens, or one per row; given none")
    for row in bounds:
        check_bounds(row, total=total)
    return any(len(row) > 2 for row in bounds)


def _documents(positions: Tensor, bounds: Sequence[Bounds]) -> Tensor:
    """Return the number of the document of each position in each row, int32 `[R, positions]`."""
    starts = [torch.tensor(list(row)[:-1]) for row in bounds]
    return torch.stack([torch.searchsorted(row, positions, right=True, out_int32=True) - 1 for row in starts])
