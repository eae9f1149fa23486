"""Checks of what is sent, to the byte and hop: against the plan, and against the textbook where all is needed."""

from collections.abc import Sequence

import torch

from longctx.kernels.mask import full
from longctx.parallel.schedules.ring import Ring
from longctx.verification import truth
from longctx.verification.attend import Counted, Outcome, attend, make_problem
from longctx.verification.bench import Bench
from longctx.verification.report import Finding
from longctx.verification.small import Small

_PASSES = ("forward", "backward")


def check_traffic(small: Small, bench: Bench, outcome: Outcome) -> list[Finding]:
    """Check the bytes of an attention in the configured dtype and head size, and those of a bidirectional one."""
    findings = as_planned(outcome.sent, "sent {}: as planned")
    if small.cp > 1:
        findings += _textbook(small, bench)
    return findings


def as_planned(sent: Sequence[Sequence[Counted]], name: str) -> list[Finding]:
    """Compare what every rank sent, `[rank][forward, backward]`, with what was planned; {} in `name` is the pass."""
    return [_as_planned([each[index] for each in sent], name.format(word)) for index, word in enumerate(_PASSES)]


def _as_planned(counted: Sequence[Counted], name: str) -> Finding:
    hops, sent = sum(each.hops for each in counted), sum(sum(each.bytes_to.values()) for each in counted)
    wrong = [(rank, each) for rank, each in enumerate(counted) if not each.as_planned]
    why = ""
    if wrong:
        rank, each = wrong[0]
        why = (
            f"cp rank {rank} made {each.hops} hops and sent {each.bytes_to} bytes by peer; by its plan it makes "
            f"{each.planned_hops} hops and sends {each.planned_bytes_to}"
        )
    return Finding(
        name=name,
        measured=f"{hops} hops, {sent:,} B",
        bound="the plan's, by peer",
        passed=not wrong,
        why=why,
    )


def _textbook(small: Small, bench: Bench) -> list[Finding]:
    """Compare a bidirectional attention, of which every rank needs everything, with the closed formulas."""
    if not isinstance(small.schedule, Ring) and small.schedule.name != "all_gather":
        return []
    head_dim, teams = small.model.head_size, small.schedule.teams(small.cp)
    problem = make_problem(small, batch=1, head_dim=head_dim, seed=4).to(torch.float32)
    outcome = attend(small, bench, problem, [full()])
    want = truth.textbook_bytes(
        small.shape(torch.float32, head_dim),
        ranks=small.cp,
        sharing=teams.size,
        tokens=small.total // small.cp,
        backward="rotate_kv" if small.schedule.name == "all_gather" else small.attention.backward,
    )
    findings = []
    for index, due in enumerate(want):
        each = [sum(sent[index].bytes_to.values()) for sent in outcome.sent]
        worst = max(each, key=lambda count: abs(count - due))
        findings.append(
            Finding(
                name=f"sent {_PASSES[index]}: textbook, no mask",
                measured=f"{worst:,} B per rank",
                bound=f"{due:,} B",
                passed=worst == due,
                why=(
                    "without a mask each rank sends (teams - 1) shards of K and V, and what a team exchanges to share "
                    f"heads; by rank {each} bytes were sent"
                ),
            )
        )
    return findings
