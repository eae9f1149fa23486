"""Needs: which tokens of which team another team's attention can see. Integers only.

From needs follow the hops that are made, the tokens that travel, and nothing about why: schedules read needs and never
a mask.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from longctx.kernels.mask import HeadMasks, Mask, plain_masks
from longctx.kernels.tiles import hull
from longctx.parallel.layout import Layout
from longctx.parallel.teams import Strip, Teams, team_shard

Span = tuple[int, int]
Table = tuple[tuple[Span | None, ...], ...]


@dataclass(frozen=True)
class Needs:
    """Spans of local indices `[begin, end)`, None where nothing is visible.

    Attributes:
        keys: `keys[a][b]`: the tokens of team b that queries of team a see.
        queries: `queries[a][b]`: the tokens of team a that see keys of team b.
    """

    keys: Table
    queries: Table

    def turned(self) -> Table:
        """Return whose queries each team must get when queries travel: `[b][a]`, the tokens of a that see b."""
        return tuple(zip(*self.queries, strict=True))


def joined_span(a: Span | None, b: Span | None) -> Span | None:
    """Return the smallest span that holds both."""
    if a is None or b is None:
        return b if a is None else a
    return min(a[0], b[0]), max(a[1], b[1])


def needs_of(layout: Layout, masks: Sequence[Mask | HeadMasks], teams: Teams, *, total: int) -> Needs:
    """Return what any row of a batch, under any head's mask, needs: K/V of all rows and heads travel together."""
    plain: dict[Mask, None] = {}
    for mask in masks:
        plain.update(dict.fromkeys(plain_masks(mask)))
    tables = [_needs(layout, mask, teams, total) for mask in plain]
    if len(tables) == 1:
        return tables[0]
    count = range(teams.count)

    def union(name: str) -> Table:
        def span(a: int, b: int) -> Span | None:
            result: Span | None = None
            for table in tables:
                result = joined_span(result, getattr(table, name)[a][b])
            return result

        return tuple(tuple(span(a, b) for b in count) for a in count)

    return Needs(union("keys"), union("queries"))


@lru_cache(maxsize=32)
def _needs(layout: Layout, mask: Mask, teams: Teams, total: int) -> Needs:
    shards = [team_shard(layout, members, total) for members in teams.members]
    pairs = [[_hull(q, k, mask, total) for k in shards] for q in shards]
    return Needs(
        keys=tuple(tuple(pair and pair[1] for pair in row) for row in pairs),
        queries=tuple(tuple(pair and pair[0] for pair in row) for row in pairs),
    )


def _hull(q: tuple[Strip, ...], k: tuple[Strip, ...], mask: Mask, total: int) -> tuple[Span, Span] | None:
    rows: Span | None = None
    columns: Span | None = None
    for q_offset, q_strip in with_offsets(q):
        for k_offset, k_strip in with_offsets(k):
            found = hull(q_strip, k_strip, mask=mask, total=total)
            if found is not None:
                (r0, r1), (c0, c1) = found
                rows = joined_span(rows, (r0 + q_offset, r1 + q_offset))
                columns = joined_span(columns, (c0 + k_offset, c1 + k_offset))
    return None if rows is None or columns is None else (rows, columns)


def with_offsets(strips: tuple[Strip, ...]) -> list[tuple[int, Strip]]:
    """Return each strip with the local index at which it begins."""
    result, offset = [], 0
    for strip in strips:
        result.append((offset, strip))
        offset += sum(segment.count for segment in strip)
    return result
