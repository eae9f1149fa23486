"""The grid of chunks: every segment is cut into chunks of one size from its own start, documents or not."""

from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from longctx.kernels.linear.contract import Cuts


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive chunks that are computed together: some of one segment's, or all of some segments of equal length.

    Attributes:
        first, end: the chunks.
        segments: the segments that they belong to, first and end.
        begins, ends: whether these segments begin and end with them.
    """

    first: int
    end: int
    segments: tuple[int, int]
    begins: bool
    ends: bool


@dataclass(frozen=True, kw_only=True)
class Chunks:
    """N chunks of C tokens.

    Attributes:
        size: C.
        lengths: tokens of each segment; its last chunk is filled up.
    """

    size: int
    lengths: tuple[int, ...]

    @property
    def counts(self) -> tuple[int, ...]:
        """Return the number of chunks of each segment."""
        return tuple(-(-length // self.size) for length in self.lengths)

    @property
    def bounds(self) -> tuple[int, ...]:
        """Return each segment's first chunk, and N at the end."""
        return tuple(accumulate(self.counts, initial=0))

    @property
    def exact(self) -> bool:
        """Say whether no chunk has to be filled up."""
        return all(length % self.size == 0 for length in self.lengths)

    def split(self, x: Tensor, *, last: bool = False) -> Tensor:
        """Return `[B, T, ...]` as `[B, N, C, ...]`: a view where nothing has to be filled up.

        Args:
            last: fill up with a segment's last token, not with zeros.
        """
        if not self.exact:
            pieces = []
            for piece, length, count in zip(x.split(self.lengths, dim=1), self.lengths, self.counts, strict=True):
                rest = (x.shape[0], count * self.size - length, *x.shape[2:])
                pieces += [piece, (piece[:, -1:] if last else x.new_zeros(())).expand(rest)]
            x = torch.cat(pieces, dim=1)
        return x.unflatten(1, (-1, self.size))

    def join(self, x: Tensor) -> Tensor:
        """Return `[B, N, C, ...]` as `[B, T, ...]`."""
        x = x.flatten(1, 2)
        if len(self.lengths) == 1 or self.exact:
            return x[:, : sum(self.lengths)]
        padded = [count * self.size for count in self.counts]
        pieces = [piece[:, :length] for piece, length in zip(x.split(padded, dim=1), self.lengths, strict=True)]
        return torch.cat(pieces, dim=1)

    def tokens(self, device: torch.device) -> Tensor | None:
        """Return the number of tokens of each chunk, int64 `[N]`; None where all are full."""
        if self.exact:
            return None
        counts = [min(self.size, length - start) for length in self.lengths for start in range(0, length, self.size)]
        return torch.tensor(counts, device=device)

    def blocks(self, most: int) -> list[Block]:
        """Return the chunks in blocks of at most `most` >= 1."""
        blocks, segment, bounds, counts = [], 0, self.bounds, self.counts
        while segment < len(counts):
            count, end = counts[segment], segment + 1
            while end < len(counts) and counts[end] == count and (end + 1 - segment) * count <= most:
                end += 1
            step = most if end == segment + 1 else (end - segment) * count
            edges = [*range(bounds[segment], bounds[end], step), bounds[end]]
            for first, last in pairwise(edges):
                blocks.append(Block(first, last, (segment, end), first == edges[0], last == edges[-1]))
            segment = end
        return blocks


def chunks_of(cuts: Cuts, size: int, *, power_of_two: bool) -> Chunks:
    """Return the grid of chunks of at most `size` tokens.

    The longest segment is cut evenly: 100 tokens make two chunks of 50, not one of 64 and one that is mostly filling.

    Args:
        power_of_two: that chunks must have, and `size` is.
    """
    longest = max(cuts.lengths)
    count = -(-longest // size)
    size = -(-longest // count)
    return Chunks(size=1 << (size - 1).bit_length() if power_of_two else size, lengths=cuts.lengths)
