"""The plan: for each rank and hop, the tiles to compute. Pure integers, printable, testable without processes.

Kernels get its tiles, schedules its needs; the trainer, the planner and the tests read its sums. Hop 0 is the own
shard, for which nothing is exchanged.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

from longctx.kernels.contract import Work, WorkList
from longctx.kernels.mask import HeadMasks, Mask
from longctx.kernels.positions import Piece, Tile, cut, total_pairs
from longctx.kernels.tiles import tiles_between
from longctx.parallel.layout import Layout
from longctx.parallel.needs import Needs, Span, needs_of, with_offsets
from longctx.parallel.schedule import Schedule
from longctx.parallel.teams import Strip, Teams, part_of, team_shard

AnyMask = Mask | HeadMasks


@dataclass(frozen=True)
class TileList:
    """Tiles of some rows of a batch and some query heads.

    Attributes:
        rows, heads: spans; None = all of them. Heads count from the rank's first.
        tiles: in local indices of the two shards, keys counted from the hop's first needed token.
    """

    rows: Span | None
    heads: Span | None
    tiles: tuple[Tile, ...]

    @property
    def pairs(self) -> int:
        """Return visible pairs, of one head where all are alike."""
        return total_pairs(self.tiles) * (self.heads[1] - self.heads[0] if self.heads else 1)


@dataclass(frozen=True)
class Hop:
    """One rank's work with (a part of) the shard of `source`, a team.

    Attributes:
        needed: the tokens of the travelling shard that this rank computes with; None = none, and there are no lists.
    """

    source: int
    needed: Span | None
    lists: tuple[TileList, ...]

    @cached_property
    def pairs(self) -> int:
        """Return the visible pairs: this hop's work."""
        return sum(each.pairs for each in self.lists)

    def work(self, kv_heads: Span, group: int) -> WorkList:
        """Return what a kernel is to compute for some KV heads, the same object every time.

        Args:
            kv_heads: those at hand; `group` query heads read each.
        """
        key = (*kv_heads, group)
        if key not in self._made:
            self._made[key] = WorkList(tuple(each for part in self.lists for each in _by_groups(part, kv_heads, group)))
        return self._made[key]

    @cached_property
    def _made(self) -> dict[tuple[int, int, int], WorkList]:
        return {}


@dataclass(frozen=True, eq=False)
class Plan:
    """All that one rank has to know about a micro-batch.

    Attributes:
        masks: one for all rows of the batch where they are alike, or one per row.
        rows: how many masks were given: 1 = one for all rows of any batch.
        total: tokens of the whole sequence.
        needs: of all teams.
        hops: in the order in which shards arrive, those with nothing to compute included.
    """

    layout: Layout
    schedule: Schedule
    rank: int
    total: int
    rows: int
    masks: tuple[AnyMask, ...]
    needs: Needs
    hops: tuple[Hop, ...]

    @property
    def tokens(self) -> int:
        """Return this rank's tokens."""
        return self.total // self.layout.cp

    @cached_property
    def teams(self) -> Teams:
        """Return the schedule's teams."""
        return self.schedule.teams(self.layout.cp)

    @cached_property
    def key_hops(self) -> dict[int, Hop]:
        """Return the hops by source: the work when K/V travel and queries stay."""
        return {hop.source: hop for hop in self.hops}

    @cached_property
    def query_hops(self) -> dict[int, Hop]:
        """Return, by source, the work when queries travel and K/V stay: tiles of a source's queries, cut to those that
        see something here, against all own keys."""
        teams, turned = self.teams, self.needs.turned()
        team = teams.place(self.rank)[0]
        place = _Place(self.layout, teams, self.rank, self.total, self.masks)
        return {source: _hop(place, source, turned[team][source], queries_travel=True) for source in range(teams.count)}

    @property
    def num_tiles(self) -> int:
        """Return the number of tiles of all hops: kernel calls per layer, for kernels that make one per tile."""
        return sum(len(each.tiles) for hop in self.hops for each in hop.lists)


# Few: with packed documents every sequence has a mask, and so a plan, of its own. Layers share the object.
@lru_cache(maxsize=8)
def plan(layout: Layout, masks: tuple[AnyMask, ...], schedule: Schedule, *, rank: int, total: int) -> Plan:
    """Return what `rank` computes at each hop for a batch of sequences of `total` tokens.

    Args:
        masks: one for all rows, or one per row.
    """
    layout.check_total(total)
    teams = schedule.teams(layout.cp)
    rows = len(masks)
    if all(mask == masks[0] for mask in masks):
        masks = masks[:1]
    needs = needs_of(layout, masks, teams, total=total)
    place = _Place(layout, teams, rank, total, masks)
    team = teams.place(rank)[0]
    order = schedule.order(team, teams.count)
    hops = tuple(_hop(place, source, needs.keys[team][source], queries_travel=False) for source in order)
    return Plan(layout, schedule, rank, total, rows, masks, needs, hops)


class _Place(NamedTuple):
    """Where a hop is planned: what all hops of a rank share."""

    layout: Layout
    teams: Teams
    rank: int
    total: int
    masks: tuple[AnyMask, ...]


def _hop(place: _Place, source: int, needed: Span | None, *, queries_travel: bool) -> Hop:
    if needed is None:
        return Hop(source, None, ())
    layout, teams, rank, total, masks = place
    team, member = teams.place(rank)
    own = team_shard(layout, teams.members[team], total)
    travelling = _part(team_shard(layout, teams.members[source], total), needed)
    # Own keys stay whole when queries travel, own queries when keys do.
    queries, keys = (travelling, with_offsets(own)) if queries_travel else (with_offsets(own), travelling)
    lists = []
    for row, mask in enumerate(masks):
        rows = None if len(masks) == 1 else (row, row + 1)
        for heads, each in _by_head(mask, member=member, team=teams.size):
            tiles = _tiles(queries, keys, each, total)
            if tiles:
                lists.append(TileList(rows, heads, tiles))
    return Hop(source, needed, tuple(lists))


def _by_groups(part: TileList, kv_heads: Span, group: int) -> Iterator[Work]:
    """Yield a list's tiles for the query heads that read `kv_heads`: whole groups together, a part of one by itself."""
    rows = slice(None) if part.rows is None else slice(*part.rows)
    first, end = kv_heads[0] * group, kv_heads[1] * group
    if part.heads is not None:
        first, end = max(first, part.heads[0]), min(end, part.heads[1])
    while first < end:
        stop = end - end % group if first % group == 0 and end - first >= group else min(end, _up(first + 1, group))
        kv = slice(first // group - kv_heads[0], _up(stop, group) // group - kv_heads[0])
        yield Work(rows, slice(first, stop), kv, part.tiles)
        first = stop


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _part(strips: tuple[Strip, ...], span: Span) -> list[tuple[int, Strip]]:
    """Return tokens `span` of a shard: strips with local indices that count from the span's begin."""
    parts = []
    for offset, strip in with_offsets(strips):
        part = part_of(strip, span[0] - offset, span[1] - offset)
        if part:
            parts.append((max(offset - span[0], 0), part))
    return parts


def _by_head(mask: AnyMask, *, member: int, team: int) -> list[tuple[Span | None, Mask]]:
    """Return the masks of a rank's heads, neighbours with equal masks together."""
    if isinstance(mask, Mask):
        return [(None, mask)]
    share = len(mask.masks) // team
    own = mask.masks[member * share : (member + 1) * share]
    runs: list[tuple[Span | None, Mask]] = []
    first = 0
    for head in range(1, share + 1):
        if head == share or own[head] != own[first]:
            runs.append(((first, head), own[first]))
            first = head
    return runs


def _tiles(queries: list[tuple[int, Strip]], keys: list[tuple[int, Strip]], mask: Mask, total: int) -> tuple[Tile, ...]:
    q_cuts, k_cuts = ([_cut(offset, strip, mask.bounds(total)) for offset, strip in side] for side in (queries, keys))
    return tuple(tile for q in q_cuts for k in k_cuts for tile in tiles_between(q, k, mask=mask, total=total))


def _cut(offset: int, strip: Strip, bounds: Sequence[int]) -> list[list[Piece]]:
    documents = cut(strip, bounds)
    if offset == 0:
        return documents
    return [[Piece(piece.begin + offset, piece.segment) for piece in pieces] for pieces in documents]
