"""Documents in chunks: which tokens see each other, which see the state that enters, which make the one that leaves."""

from dataclasses import dataclass

import torch
from torch import Tensor

from longctx.kernels.linear.chunks import Chunks
from longctx.kernels.linear.contract import Cuts


@dataclass(frozen=True, slots=True)
class Sight:
    """Factors 0 and 1 for chunks `[R, N]`, R rows.

    Attributes:
        pairs: `[R, N, 1, C, C]`, tokens of one document.
        entering: `[R, N, 1, C, 1]`, tokens of the document whose state enters the chunk.
        leaving: `[R, N, 1, C, 1]`, tokens of the document whose state leaves it.
        across: `[R, N, 1, 1, 1]`, no document begins in the chunk, at its first token neither.
    """

    pairs: Tensor
    entering: Tensor
    leaving: Tensor
    across: Tensor


class Documents:
    """The documents of all chunks' tokens."""

    def __init__(self, cuts: Cuts, chunks: Chunks) -> None:
        """Take cuts that have documents."""
        assert cuts.documents is not None and cuts.before is not None
        self._own = chunks.split(cuts.documents, last=True)  # [R, N, C]
        entering = torch.cat([cuts.before[:, :1], self._own[:, :-1, -1]], dim=1)
        firsts = torch.tensor(chunks.bounds[:-1], device=entering.device)
        self._entering = entering.index_copy(1, firsts, cuts.before)  # [R, N]

    def sight(self, first: int, end: int, dtype: torch.dtype) -> Sight:
        """Return the factors for the chunks from `first` to `end`."""
        own = self._own[:, first:end, None, :, None]
        entering = self._entering[:, first:end, None, None, None]
        leaving = own[..., -1:, :]
        masks = (own == own.mT, own == entering, own == leaving, entering == leaving)
        return Sight(*(mask.to(dtype) for mask in masks))
