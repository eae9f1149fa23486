"""From what rows see to what blocks of rows visit: ranges of blocks of columns, whole ones apart from masked ones.

Integers only, on the CPU: `height` rows are a block, `width` columns another. A pair of blocks of which every row sees
every column needs no mask. The others are visited once for each layer of intervals that reaches into them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from longctx.kernels.softmax.triton.intervals import Intervals

NO_MASK = -1


@dataclass(frozen=True)
class Ranges:
    """What blocks of rows visit.

    Attributes:
        block: int64 `[N]`, ascending: blocks of rows that visit anything.
        bounds: int64 `[N, 3]`: block n visits `ranges[bounds[n, 0] : bounds[n, 1]]` without a mask and
            `ranges[bounds[n, 1] : bounds[n, 2]]` with one.
        ranges: int64 `[R, 3]`: first block of columns, the one after the last, layer of the intervals (or `NO_MASK`).
        cost: int64 `[N]`: pairs of blocks to visit.
    """

    block: Tensor
    bounds: Tensor
    ranges: Tensor
    cost: Tensor


def ranges_of(intervals: Intervals, *, rows: int, height: int, width: int) -> Ranges:
    """Return what blocks of `height` of `rows` rows visit among blocks of `width` columns."""
    if not intervals.layers:
        empty = torch.empty(0, dtype=torch.int64)
        return Ranges(empty, empty.view(0, 3), empty.view(0, 3), empty)
    block, layer, begin, end = _sorted(intervals, height)
    first, stop = begin // width, (end - 1) // width + 1
    # Runs: intervals of one block and layer whose blocks of columns leave no gap between them.
    group = block * intervals.layers + layer
    reach = (group * (int(stop.max()) + 1) + stop).cummax(0).values - group * (int(stop.max()) + 1)
    new = torch.ones_like(group, dtype=torch.bool)
    new[1:] = (group[1:] != group[:-1]) | (first[1:] > reach[:-1])
    run, heads = new.cumsum(0) - 1, new.nonzero()[:, 0]
    count = len(heads)
    block, layer, first = block[heads], layer[heads], first[heads]
    stop = _reduced(stop, run, count, "amax")
    members = torch.zeros(count, dtype=torch.int64).index_add_(0, run, torch.ones_like(run))
    everyone = members == (rows - block * height).clamp(max=height)
    whole_first = -(-_reduced(begin, run, count, "amax") // width)
    whole_stop = _reduced(end, run, count, "amin") // width
    whole_first = torch.where(everyone, whole_first, stop)
    whole_stop = torch.where(everyone, whole_stop, stop)
    none = whole_first >= whole_stop
    whole_first, whole_stop = (torch.where(none, stop, x) for x in (whole_first, whole_stop))
    unmasked = torch.full_like(layer, NO_MASK)
    parts = ((first, whole_first, layer), (whole_first, whole_stop, unmasked), (whole_stop, stop, layer))
    ranges = torch.cat([torch.stack(part, 1) for part in parts])
    owner = block.repeat(3)
    kept = ranges[:, 0] < ranges[:, 1]
    return _by_block(owner[kept], ranges[kept])


def _sorted(intervals: Intervals, height: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return block, layer, begin and end, in this order."""
    block, layer, begin, end = intervals.row // height, intervals.layer, intervals.begin, intervals.end
    order = (block * intervals.layers + layer) * (int(end.max()) + 1) + begin
    if not bool((order[1:] >= order[:-1]).all()):
        order = order.argsort()
        block, layer, begin, end = block[order], layer[order], begin[order], end[order]
    return block, layer, begin, end


def _reduced(x: Tensor, run: Tensor, count: int, how: str) -> Tensor:
    return torch.empty(count, dtype=x.dtype).scatter_reduce_(0, run, x, how, include_self=False)


def _by_block(owner: Tensor, ranges: Tensor) -> Ranges:
    masked = (ranges[:, 2] != NO_MASK).long()
    order = (owner * 2 + masked).argsort(stable=True)
    owner, ranges, masked = owner[order], ranges[order], masked[order]
    block, counts = torch.unique_consecutive(owner, return_counts=True)
    index = torch.repeat_interleave(counts)
    last = counts.cumsum(0)
    with_mask = torch.zeros_like(counts).index_add_(0, index, masked)
    cost = torch.zeros_like(counts).index_add_(0, index, ranges[:, 1] - ranges[:, 0])
    return Ranges(block, torch.stack((last - counts, last - with_mask, last), 1), ranges, cost)
