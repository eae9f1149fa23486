"""The grid of chunks: each segment is cut into chunks of one size from its own start, documents or not."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import pad

from longctx.kernels.linear.contract import Cuts


@dataclass(frozen=True, kw_only=True)
class Chunks:
    """N chunks of C tokens, segment by segment.

    Attributes:
        size: C.
        lengths: tokens of each segment.
    """

    size: int
    lengths: tuple[int, ...]

    @property
    def counts(self) -> tuple[int, ...]:
        """Return the number of chunks of each segment."""
        return tuple(-(-length // self.size) for length in self.lengths)

    @property
    def total(self) -> int:
        """Return N."""
        return sum(self.counts)

    @property
    def firsts(self) -> tuple[int, ...]:
        """Return each segment's first chunk."""
        firsts = [0]
        for count in self.counts[:-1]:
            firsts.append(firsts[-1] + count)
        return tuple(firsts)

    @property
    def exact(self) -> bool:
        """Say whether no chunk is padded."""
        return all(length % self.size == 0 for length in self.lengths)

    def split(self, x: Tensor, *, last: bool = False) -> Tensor:
        """Return `[B, T, ...]` as `[B, N, C, ...]`: a view where nothing has to be padded.

        Args:
            last: pad a segment with its last token, not with zeros.
        """
        if not self.exact:
            pieces = []
            for piece, length, count in zip(x.split(self.lengths, dim=1), self.lengths, self.counts, strict=True):
                pieces.append(piece)
                missing = count * self.size - length
                if missing:
                    rest = (x.shape[0], missing, *x.shape[2:])
                    pieces.append(piece[:, -1:].expand(rest) if last else x.new_zeros(()).expand(rest))
            x = torch.cat(pieces, dim=1)
        return x.unflatten(1, (self.total, self.size))

    def join(self, x: Tensor) -> Tensor:
        """Return `[B, N, C, ...]` as `[B, T, ...]`, without the padding."""
        x = x.flatten(1, 2)
        if self.exact:
            return x
        padded = [count * self.size for count in self.counts]
        pieces = [piece[:, :length] for piece, length in zip(x.split(padded, dim=1), self.lengths, strict=True)]
        return torch.cat(pieces, dim=1)

    def valid(self, device: torch.device) -> Tensor | None:
        """Return the number of tokens of each chunk, int64 `[N]`; None where all are full."""
        if self.exact:
            return None
        counts = [min(self.size, length - start) for length in self.lengths for start in range(0, length, self.size)]
        return torch.tensor(counts, device=device)


@dataclass(frozen=True, kw_only=True)
class Sight:
    """Who is in whose document, in chunks: bool, R rows.

    Attributes:
        pairs: `[R, N, 1, C, C]`, tokens of one document.
        entering: `[R, N, 1, C, 1]`, tokens of the document whose state enters the chunk.
        leaving: `[R, N, 1, C, 1]`, tokens of the document whose state leaves it.
        across: `[R, N, 1, 1, 1]`, no document begins in the chunk.
    """

    pairs: Tensor
    entering: Tensor
    leaving: Tensor
    across: Tensor

    def block(self, first: int, end: int) -> "Sight":
        """Return that of some of the chunks."""
        return Sight(
            pairs=self.pairs[:, first:end],
            entering=self.entering[:, first:end],
            leaving=self.leaving[:, first:end],
            across=self.across[:, first:end],
        )


def sight(cuts: Cuts, chunks: Chunks) -> Sight | None:
    """Return who is in whose document; None where all are in one."""
    if cuts.documents is None or cuts.before is None:
        return None
    documents = chunks.split(cuts.documents, last=True)  # [R, N, C]
    entering = torch.cat([cuts.before[:, :1], documents[:, :-1, -1]], dim=1)
    firsts = torch.tensor(chunks.firsts, device=documents.device)
    entering = entering.index_copy(1, firsts, cuts.before)[:, :, None, None, None]
    leaving = documents[:, :, -1, None, None, None]
    column, row = documents[:, :, None, :, None], documents[:, :, None, None, :]
    return Sight(
        pairs=column == row, entering=column == entering, leaving=column == leaving, across=entering == leaving
    )


def chunks_of(cuts: Cuts, size: int, *, power_of_two: bool) -> Chunks:
    """Return the grid of chunks of at most `size` tokens.

    The longest segment is cut evenly: 100 tokens make two chunks of 50, not one of 64 and one that is mostly padding.

    Args:
        power_of_two: that chunks must have, and `size` is.
    """
    longest = max(cuts.lengths)
    count = -(-longest // size)
    size = -(-longest // count)
    return Chunks(size=1 << (size - 1).bit_length() if power_of_two else size, lengths=cuts.lengths)
