"""Checks of the plan, integers only: every visible pair is computed once, by the rank and hop that has it."""

import torch
from torch import Tensor

from longctx.kernels.mask import plain_masks
from longctx.kernels.tiles import visible
from longctx.parallel.balance import Balance, balance, visible_pairs
from longctx.parallel.heads import HeadSplit
from longctx.parallel.plan import Hop, Plan, plan
from longctx.parallel.teams import team_shard
from longctx.verification.report import Finding, none_wrong
from longctx.verification.small import Small, typical_documents

_COUNTING = 200_000  # pairs of ranks x (documents + segments) that are gone through at the configured length


def check_plan(small: Small) -> list[Finding]:
    """Check coverage of all ranks' tiles, the shards that are fetched, and tell the balance."""
    plans = [plan(small.layout, small.masks, small.schedule, rank=rank, total=small.total) for rank in range(small.cp)]
    findings = [_coverage(small, plans, queries_travel=False)]
    if small.schedule.moves_queries(small.shape(small.dtype, small.source.model.head_size)):
        findings.append(_coverage(small, plans, queries_travel=True))
    if plans[0].teams.count > 1:
        findings.append(_fetched(small, plans[0]))
    return [*findings, *_full_size(small)]


def team_positions(small: Small, members: tuple[int, ...]) -> Tensor:
    """Return the positions of a team's tokens in the order in which it holds them."""
    segments = [segment for strip in team_shard(small.layout, members, small.total) for segment in strip]
    return torch.cat([s.start + s.stride * torch.arange(s.count) for s in segments])


def _coverage(small: Small, plans: list[Plan], *, queries_travel: bool) -> Finding:
    """Count how often each pair of each head is computed, over all ranks and hops."""
    heads, total = small.model.num_heads, small.total
    counts = torch.zeros(len(small.samples), heads, total, total, dtype=torch.uint8)
    for rank, each in enumerate(plans):
        hops = list(each.query_hops.values()) if queries_travel else list(each.hops)
        for hop in hops:
            _count(small, each, hop, rank, counts, queries_travel=queries_travel)
    seen = torch.stack([allowed.expand(heads, -1, -1) for allowed in small.allowed])
    missed, twice, hidden = (int(x.sum()) for x in (seen & (counts == 0), seen & (counts > 1), ~seen & (counts > 0)))
    name = "plan: pairs, when queries travel" if queries_travel else "plan: pairs computed once"
    why = f"{missed:,} visible pairs are not computed, {twice:,} more than once, {hidden:,} hidden ones are"
    return none_wrong(name, missed + twice + hidden, counts.numel(), why=why)


def _count(small: Small, each: Plan, hop: Hop, rank: int, counts: Tensor, *, queries_travel: bool) -> None:
    if hop.needed is None:
        return
    teams = each.teams
    team, member = teams.place(rank)
    own = team_positions(small, teams.members[team])
    coming = team_positions(small, teams.members[hop.source])[hop.needed[0] : hop.needed[1]]
    queries, keys = (coming, own) if queries_travel else (own, coming)
    mine = HeadSplit(small.model.num_heads, small.model.num_kv_heads, teams.size).q(member)
    for tiles in hop.lists:
        rows = slice(None) if tiles.rows is None else slice(*tiles.rows)
        begin, end = tiles.heads or (0, len(mine))
        for tile in tiles.tiles:
            q, k = queries[tile.rows], keys[tile.columns]
            counts[rows, mine[0] + begin : mine[0] + end, q[:, None], k[None, :]] += visible(tile, device="cpu").to(
                torch.uint8
            )


def _full_size(small: Small) -> list[Finding]:
    """Count the pairs of all ranks at the configured length, where nothing is scaled, and tell the balance there.

    Where that would take long, tell the balance of the small size.
    """
    source, total = small.source, small.source.data.seq_len
    layout = source.attention.make_layout(small.cp)
    segments = len(layout.segments(0, total))
    bounds = typical_documents(total)
    if small.cp**2 * (len(bounds) + segments) > _COUNTING:
        work = balance(small.layout, small.masks, small.schedule, total=small.total)
        return [_balance("plan: balance at this size", work)]
    mask = source.attention.mask(bounds)
    schedule = source.attention.make_schedule(
        small.cp,
        heads=source.model.num_heads,
        kv_heads=source.model.num_kv_heads,
        per_machine=small.per_machine,
    )
    work = balance(layout, [mask], schedule, total=total)
    pairs = sum(visible_pairs(each, total=total) for each in plain_masks(mask))
    why = (
        f"of {len(bounds) - 1} documents in {total:,} tokens, all ranks together against one rank that has all of them"
    )
    return [
        Finding(
            name=f"plan: pairs of {total:,} tokens",
            measured=f"{work.total:,}",
            bound=f"{pairs:,}",
            passed=work.total == pairs,
            why=why,
        ),
        _balance(f"plan: balance, {total:,} tokens", work),
    ]


def _balance(name: str, work: Balance) -> Finding:
    measured, bound = f"{work.efficiency:.1%} of ideal", f"busiest {work.imbalance:.2f}x"
    return Finding(name=name, measured=measured, bound=bound, passed=None)


def _fetched(small: Small, any_plan: Plan) -> Finding:
    """Compare the shards that a team asks another one for with those that it sees something of."""
    members, keys = any_plan.teams.members, any_plan.needs.keys
    seen = torch.stack([allowed.any(dim=0) for allowed in small.allowed]).any(dim=0)
    places = [team_positions(small, each) for each in members]
    pairs = [(a, b) for a in range(len(members)) for b in range(len(members)) if a != b]
    visible_pairs = {(a, b) for a, b in pairs if seen[places[a][:, None], places[b][None, :]].any()}
    asked = {(a, b) for a, b in pairs if keys[a][b] is not None}
    tokens = sum(span[1] - span[0] for a, b in asked if (span := keys[a][b]) is not None)
    whole = small.total // len(members)
    return Finding(
        name="plan: shards fetched",
        measured=f"{len(asked)} of {len(pairs)}, {tokens / (whole * len(pairs)):.0%} of tokens",
        bound=f"{len(visible_pairs)} have something",
        # Stripes are on all ranks, so what they need is told without looking at documents and chunks: it may be more.
        passed=asked == visible_pairs or (small.layout.name == "striped" and asked > visible_pairs),
        why=(
            f"(reader, owner) asked for though nothing is visible: {sorted(asked - visible_pairs)}; not asked "
            f"for though something is: {sorted(visible_pairs - asked)}"
        ),
    )
