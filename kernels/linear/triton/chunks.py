"""Where a rank's tokens are cut into chunks, as tables that kernels read.

Every segment is cut into chunks from its own first token; its last chunk may be short. Nothing is padded or copied: a
kernel reads where its chunk begins and how many tokens it has.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from longctx.kernels.linear.contract import Cuts


@dataclass(frozen=True, eq=False)
class ChunkTable:
    """The N chunks of one rank's P segments.

    Attributes:
        size: tokens of a chunk at most.
        per_segment: chunks of each segment; their sum is N.
        begin: int64 `[N]`, each chunk's first token.
        count: int32 `[N]`, its tokens, 1 to `size`.
        last: int64 `[N]`, its last token.
        bounds: int32 `[P + 1]`, where each segment's chunks begin, and N.
    """

    size: int
    per_segment: tuple[int, ...]
    begin: Tensor
    count: Tensor
    last: Tensor
    bounds: Tensor

    @property
    def chunks(self) -> int:
        """Return N."""
        return sum(self.per_segment)


@dataclass(frozen=True, eq=False)
class ChunkDocuments:
    """Documents as kernels compare them; R rows, 1 = the same for all sequences.

    Attributes:
        tokens: int32 `[R, T]`, each token's document.
        entering: int32 `[R, N]`, the document that the state entering each chunk is of.
        kept: bool `[R, N]`, whether the state that enters a chunk also leaves it: no document begins in it.
        carried: bool `[R, P]`, the same of segments.
    """

    tokens: Tensor
    entering: Tensor
    kept: Tensor
    carried: Tensor


@lru_cache(maxsize=256)
def chunk_table(lengths: tuple[int, ...], size: int, device: torch.device) -> ChunkTable:
    """Return the chunks of segments of these lengths."""
    begins, counts, per_segment, first = [], [], [], 0
    for length in lengths:
        starts = range(0, length, size)
        begins += [first + start for start in starts]
        counts += [min(size, length - start) for start in starts]
        per_segment.append(len(starts))
        first += length
    begin, count = torch.tensor(begins, dtype=torch.int64), torch.tensor(counts, dtype=torch.int32)
    bounds = torch.tensor([0, *per_segment]).cumsum(0).to(torch.int32)
    return ChunkTable(
        size,
        tuple(per_segment),
        begin.to(device),
        count.to(device),
        (begin + count - 1).to(device),
        bounds.to(device),
    )


def chunk_documents(cuts: Cuts, table: ChunkTable) -> ChunkDocuments | None:
    """Return the documents of a rank's chunks, or None where all tokens are of one."""
    if cuts.documents is None or cuts.before is None:
        return None
    tokens, first = cuts.documents, table.bounds[:-1].long()
    entering = tokens[:, (table.begin - 1).clamp(min=0)]  # for a segment's first chunk, its `before` instead
    entering = entering.index_copy(1, first, cuts.before)
    leaving = tokens[:, table.last]
    ends = table.bounds[1:].long() - 1
    return ChunkDocuments(
        tokens.contiguous(), entering.contiguous(), entering == leaving, cuts.before == leaving[:, ends]
    )
