"""Token layouts: which global positions a context-parallel rank owns. Integers first, tensors second.

| layout     | rank r of cp owns                      | segments       | balance of a causal mask            |
|------------|----------------------------------------|----------------|-------------------------------------|
| contiguous | [r n, (r+1) n)                         | 1 of stride 1  | cp / (2 cp - 1) of ideal            |
| zigzag     | chunks r and 2 cp - 1 - r of 2 cp      | 2 of stride 1  | exact for one document              |
| striped    | width 1: r, r + cp, r + 2 cp, ...      | 1 of stride cp | 1 - (cp-1) / (cp (n+1))   |
|            | width w: w positions of every cp w     | n/w, stride 1  | less where documents are short      |

Any total that is a multiple of cp works: an odd zigzag shard has its two chunks one token apart, and the last round of
wide stripes is narrower.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from longctx.kernels.positions import Segment

LayoutName = Literal["contiguous", "zigzag", "striped"]


@dataclass(frozen=True)
class Layout:
    """A token layout over `cp` ranks.

    Attributes:
        name: `contiguous`, `zigzag` or `striped`.
        cp: number of ranks that share a sequence.
        width: tokens per stripe, `striped` only.
    """

    name: LayoutName
    cp: int
    width: int = 1

    def __post_init__(self) -> None:
        if self.name not in get_args(LayoutName):
            raise ValueError(f"attention.layout={self.name} is not known; known are {', '.join(get_args(LayoutName))}")
        if self.cp < 1:
            raise ValueError(f"parallel.cp must be >= 1; given {self.cp}")
        if self.width < 1:
            raise ValueError(f"attention.width must be >= 1; given {self.width}")
        if self.width != 1 and self.name != "striped":
            raise ValueError(f"attention.width={self.width} needs attention.layout=striped; given {self.name}")

    def check_total(self, total: int) -> None:
        """Refuse a sequence length that the ranks cannot share evenly."""
        if total < self.cp or total % self.cp:
            near = max(total // self.cp, 1) * self.cp
            raise ValueError(
                f"data.seq_len={total} cannot be divided by parallel.cp={self.cp} (layout {self.name}): use a multiple "
                f"of {self.cp} such as {near} or {near + self.cp}"
            )

    def segments(self, rank: int, total: int) -> tuple[Segment, ...]:
        """Return rank's positions as ascending segments; `total` is a multiple of `cp`."""
        self.check_total(total)
        assert 0 <= rank < self.cp, (rank, self)
        n = total // self.cp
        if self.cp == 1:
            return (Segment(0, 1, total),)
        if self.name == "contiguous":
            return (Segment(rank * n, 1, n),)
        if self.name == "zigzag":
            head, tail = n - n // 2, n // 2
            tail_start = self.cp * head + (self.cp - 1 - rank) * tail
            pieces = (Segment(rank * head, 1, head), Segment(tail_start, 1, tail) if tail else None)
            return tuple(piece for piece in pieces if piece is not None)
        if self.width == 1:
            return (Segment(rank, self.cp, n),)
        rounds, rest = divmod(n, self.width)
        stripes = [Segment((i * self.cp + rank) * self.width, 1, self.width) for i in range(rounds)]
        if rest:
            stripes.append(Segment(rounds * self.cp * self.width + rank * rest, 1, rest))
        return tuple(stripes)

    def positions(self, rank: int, total: int) -> Tensor:
        """Return rank's global positions in local order, int64 `[total / cp]`."""
        parts = [torch.arange(s.start, s.last + 1, s.stride, dtype=torch.int64) for s in self.segments(rank, total)]
        return torch.cat(parts)

    def shard(self, x: Tensor, *, rank: int, dim: int) -> Tensor:
        """Return rank's tokens of a whole tensor along `dim`, in local order, contiguous."""
        return x.index_select(dim, self.positions(rank, x.shape[dim]).to(x.device))

    def unshard(self, shards: Sequence[Tensor], *, dim: int) -> Tensor:
        """Put all ranks' shards (in rank order) back into one tensor in position order: the inverse of `shard`."""
        assert len(shards) == self.cp, (len(shards), self)
        total = sum(shard.shape[dim] for shard in shards)
        order = torch.cat([self.positions(rank, total) for rank in range(self.cp)])
        return torch.cat(list(shards), dim=dim).index_select(dim, torch.argsort(order).to(shards[0].device))

    def describe(self) -> str:
        """Return a short name for a log line."""
        return f"striped(width {self.width})" if self.name == "striped" else self.name
