"""A kernel call's work as tables for a device: items, longest first, and what each of them visits.

An item is what one program does at a time: a block of rows of one row of the batch and one head. Made once for a
`WorkList` and kept for as long as that lives, so that every layer and step with the same plan finds it.
"""

from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from longctx.kernels.contract import Work, WorkList
from longctx.kernels.softmax.triton.intervals import intervals_of, transposed
from longctx.kernels.softmax.triton.ranges import NO_MASK, ranges_of


class Sizes(NamedTuple):
    """The sizes of a call that tables depend on. `programs`: how many work side by side; None = one for each item."""

    batch: int
    q_tokens: int
    k_tokens: int
    q_block: int
    k_block: int
    programs: int | None


@dataclass(frozen=True, eq=False)
class Table:
    """One launch, or several one after another where two items would write to the same rows.

    Attributes:
        items: int32 `[N, 8]` of each launch: block of rows, ranges without a mask, with one, end of these, row of the
            batch, query head, KV head, number of query heads.
        ranges: int32 `[R, 3]`: first block of columns, the one after the last, row of `begins` and `ends`.
        begins, ends: int32 `[L, rows]`: the columns that rows see.
    """

    items: tuple[Tensor, ...]
    ranges: Tensor
    begins: Tensor
    ends: Tensor


_kept: "WeakKeyDictionary[WorkList, dict[tuple[object, ...], Table]]" = WeakKeyDictionary()


def query_table(work: WorkList, sizes: Sizes, device: torch.device) -> Table:
    """Return the items of kernels whose programs have a block of queries and visit blocks of keys."""
    return _table(work, sizes, device, by_keys=False)


def key_table(work: WorkList, sizes: Sizes, device: torch.device) -> Table:
    """Return the items of kernels whose programs have a block of keys and visit blocks of queries of all its heads."""
    return _table(work, sizes, device, by_keys=True)


def _table(work: WorkList, sizes: Sizes, device: torch.device, *, by_keys: bool) -> Table:
    kept = _kept.setdefault(work, {})
    key = (sizes, device, by_keys)
    if key not in kept:
        kept[key] = _made(work, sizes, device, by_keys=by_keys)
    return kept[key]


def _made(work: WorkList, sizes: Sizes, device: torch.device, *, by_keys: bool) -> Table:
    assert not any(_meet(a, b, sizes.batch, by_keys=False) for a, b in combinations(work.parts, 2)), "a head twice"
    rows, height, width = sizes.q_tokens, sizes.q_block, sizes.k_block
    if by_keys:
        rows, height, width = sizes.k_tokens, sizes.k_block, sizes.q_block
    launches = []
    begins, ends = ([torch.zeros(0, rows, dtype=torch.int32)] for _ in range(2))
    ranges = [torch.zeros(0, 3, dtype=torch.int64)]
    layers = visits = 0
    for wave in _waves(work, sizes.batch) if by_keys else [list(work.parts)]:
        items = [torch.zeros(0, 8, dtype=torch.int64)]
        costs = [torch.zeros(0, dtype=torch.int64)]
        for part in wave:
            intervals = intervals_of(part.tiles)
            if by_keys:
                intervals = transposed(intervals, rows=sizes.q_tokens)
            found = ranges_of(intervals, rows=rows, height=height, width=width)
            begin, end = intervals.dense(rows)
            begins.append(begin)
            ends.append(end)
            masked = found.ranges[:, 2:] != NO_MASK
            ranges.append(torch.cat((found.ranges[:, :2], (found.ranges[:, 2:] + layers) * masked), 1))
            heads = _key_heads(part, sizes.batch) if by_keys else _query_heads(part, sizes.batch)
            blocks = torch.cat((found.block[:, None], found.bounds + visits), 1)
            items.append(torch.cat((blocks.repeat_interleave(len(heads), 0), heads.repeat(len(blocks), 1)), 1))
            costs.append((found.cost[:, None] * heads[:, 3]).flatten())
            layers, visits = layers + intervals.layers, visits + len(found.ranges)
        launches.append(_longest_first(torch.cat(items), torch.cat(costs), sizes.programs))

    def there(x: Tensor) -> Tensor:
        x = x.to(torch.int32).contiguous()
        if device.type == "cuda":
            x = x.pin_memory()  # or the copy would wait for all that the device has to do
        return x.to(device, non_blocking=True)

    items_there = tuple(there(x) for x in launches if len(x))
    return Table(items_there, there(torch.cat(ranges)), there(torch.cat(begins)), there(torch.cat(ends)))


def _query_heads(part: Work, batch: int) -> Tensor:
    """Return (row of the batch, query head, KV head, 1) of a part's heads, those that share a KV head side by side."""
    rows = range(*part.rows.indices(batch))
    group = _group(part)
    heads = range(part.heads.start, part.heads.stop)
    found = [(row, head, part.kv_heads.start + (head - heads.start) // group, 1) for row in rows for head in heads]
    return torch.tensor(found, dtype=torch.int64).view(-1, 4)


def _key_heads(part: Work, batch: int) -> Tensor:
    """Return (row of the batch, first query head, KV head, number of query heads) of a part's KV heads."""
    rows = range(*part.rows.indices(batch))
    group = _group(part)
    kv_heads = range(part.kv_heads.start, part.kv_heads.stop)
    found = [(row, part.heads.start + n * group, kv, group) for row in rows for n, kv in enumerate(kv_heads)]
    return torch.tensor(found, dtype=torch.int64).view(-1, 4)


def _group(part: Work) -> int:
    return (part.heads.stop - part.heads.start) // (part.kv_heads.stop - part.kv_heads.start)


def _waves(work: WorkList, batch: int) -> list[list[Work]]:
    """Return a work's parts so that no two of a wave have a KV head of a row of the batch in common."""
    waves: list[list[Work]] = []
    for part in work.parts:
        wave = next(
            (wave for wave in waves if not any(_meet(part, other, batch, by_keys=True) for other in wave)), None
        )
        if wave is None:
            waves.append(wave := [])
        wave.append(part)
    return waves


def _meet(a: Work, b: Work, batch: int, *, by_keys: bool) -> bool:
    """Tell whether two parts have a head of a row of the batch in common: a KV head, or a query head."""
    heads = (a.kv_heads, b.kv_heads) if by_keys else (a.heads, b.heads)
    return _overlap(*heads) and _overlap(*(slice(*part.rows.indices(batch)) for part in (a, b)))


def _overlap(a: slice, b: slice) -> bool:
    return bool(max(a.start, b.start) < min(a.stop, b.stop))


def _longest_first(items: Tensor, cost: Tensor, programs: int | None) -> Tensor:
    """Return items by falling cost; for P programs back and forth: program p does p, 2P - 1 - p, 2P + p, ..."""
    items = items[cost.argsort(descending=True, stable=True)]
    if programs is None or programs >= len(items):
        return items
    turns = torch.arange(len(items)) // programs
    place = torch.arange(len(items)) % programs
    there = turns * programs + torch.where(turns % 2 == 0, place, programs - 1 - place)
    # The last turn may be short: what would come after its end goes to its free places.
    last = (len(items) // programs) * programs
    there[last:] = torch.arange(last, len(items))
    return items[there]
