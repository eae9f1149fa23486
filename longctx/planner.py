"""Choose layout and schedule where config says `auto`: the fastest by prediction among all that are legal.

One layer, forward and backward, for the run's own first sequences (`parallel/predict.py` says what is counted). What
the user has fixed stays fixed. docs/planner.md explains the table that is printed.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import gcd

from longctx.attention_config import AttentionConfig
from longctx.mixers.pattern import LINEAR_KINDS, SOFTMAX_KINDS, parse_round
from longctx.parallel.links import Speeds
from longctx.parallel.plan import AnyMask
from longctx.parallel.predict import Prediction, predict
from longctx.parallel.schedule import Shape
from longctx.parallel.workload import Counter

SAMPLES = 4  # sequences of the run that are looked at
MANY_RANKS = 8  # above, one of them: counting grows with cp^2 or more
MOST_RANKS = 32  # above, no stripes but single tokens, for the same reason
CLOSE = 0.01  # of candidates this near the fastest, the one with the fewest far bytes, then the first, is chosen
LEAST_WIDTH = 64  # tokens of the narrowest stripe that is tried besides 1
STRIPES = (2, 8)  # stripes per rank that are tried besides single tokens


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What was chosen, and why.

    Attributes:
        config: with names for `auto`.
        ranked: all candidates and their mean predictions, the fastest first.
        sequences: how many were looked at.
    """

    config: AttentionConfig
    ranked: tuple[tuple[AttentionConfig, Prediction], ...]
    sequences: int
    speeds: Speeds

    def explain(self, *, rows: int = 5) -> str:
        """Return the table of the best candidates, the chosen one marked, in lines of text."""
        places = list(range(min(rows, len(self.ranked))))
        chosen = next(place for place, (config, _) in enumerate(self.ranked) if config == self.config)
        if chosen not in places:
            places[-1] = chosen
        lines = [
            f"auto: {label(self.config)}, of {len(self.ranked)} candidate(s) within {CLOSE:.0%} of the fastest the one "
            "that sends least between machines, then the simplest; one layer, forward and backward, mean of "
            f"{self.sequences} sequence(s), predicted with",
            f"  {self.speeds.describe()}",
        ]
        width = max(len(label(self.ranked[place][0])) for place in places)
        head = ("ms", "of ideal", "compute", "exposed", "MB sent", "MB far")
        lines.append(f"    {'':{width}}" + "".join(f"{name:>10}" for name in head))
        for place in places:
            config, each = self.ranked[place]
            numbers = (
                f"{each.seconds * 1e3:.3g}",
                f"{each.efficiency:.1%}",
                f"{each.compute * 1e3:.3g}",
                f"{each.exposed * 1e3:.3g}",
                f"{each.bytes / 1e6:.3g}",
                f"{each.far_bytes / 1e6:.3g}",
            )
            mark = "*" if config == self.config else " "
            lines.append(f"  {mark} {label(config):{width}}" + "".join(f"{number:>10}" for number in numbers))
        sampled = [each.sampled for _, each in self.ranked if each.sampled is not None]
        if sampled:
            lines.append(f"  striped: the work was counted with {min(sampled)} documents that stand for all")
        kinds = set() if self.config.layers is None else set(parse_round(self.config.layers))
        if kinds.intersection(LINEAR_KINDS):
            lines.append("  softmax layers: what linear ones send (states, halos, relayouts) is not in these numbers")
        if kinds.issuperset(SOFTMAX_KINDS):
            lines.append("  layers of kind full: those of kind window have less to do")
        return "\n".join(lines)


def label(config: AttentionConfig) -> str:
    """Return layout and schedule with what was chosen for them, as one word each."""
    width = f"({config.width})" if config.layout == "striped" else ""
    options = [f"{key}={value}" for key, value in vars(config.options).items() if value is not None]
    arguments = f"({', '.join(options)})" if options else ""
    return f"{config.layout}{width} x {config.schedule}{arguments}"


def choose(
    config: AttentionConfig,
    masks: Sequence[AnyMask],
    *,
    total: int,
    cp: int,
    shape: Shape,
    speeds: Speeds,
    per_machine: int,
) -> Choice:
    """Return `config` with names for `auto`.

    Args:
        masks: of some of the run's sequences; at most `SAMPLES` are looked at, one where ranks are many.
        total: tokens of a sequence.
        cp: ranks that share it, `per_machine` neighbours of which are on one machine.
        shape: the heads of a layer.

    Raises:
        ValueError: nothing that is left to choose is legal; the last candidate's reason.
    """
    masks = masks[: SAMPLES if cp <= MANY_RANKS else 1]
    assert masks
    counters = [Counter(mask, total=total, heads=shape.heads) for mask in masks]
    found: list[tuple[AttentionConfig, Prediction]] = []
    problem: ValueError | None = None
    for candidate in candidates(config, total=total, cp=cp, heads=shape.heads, per_machine=per_machine):
        try:
            candidate.validate()
            layout = candidate.make_layout(cp)
            schedule = candidate.make_schedule(cp, heads=shape.heads, kv_heads=shape.kv_heads, per_machine=per_machine)
        except ValueError as error:
            problem = error
            continue
        each = [predict(layout, schedule, c, shape=shape, speeds=speeds, per_machine=per_machine) for c in counters]
        found.append((candidate, _mean(each)))
    if not found:
        assert problem is not None
        raise problem
    best = min(prediction.seconds for _, prediction in found)
    close = [entry for entry in found if entry[1].seconds <= best * (1 + CLOSE)]
    chosen = min(close, key=lambda entry: entry[1].far_bytes)[0]  # links between machines are shared; then the simplest
    ranked = sorted(found, key=lambda entry: entry[1].seconds)
    return Choice(config=chosen, ranked=tuple(ranked), sequences=len(masks), speeds=speeds)


def candidates(
    config: AttentionConfig, *, total: int, cp: int, heads: int, per_machine: int
) -> Iterator[AttentionConfig]:
    """Yield what `auto` may become, simple things first; some may be illegal.

    Args:
        heads: query heads, over which ranks of a team are split.
    """
    layouts: list[tuple[str, int]] = [(config.layout, config.width)]
    if config.layout == "auto":
        # One team of all ranks does the same work under any layout: the one that keeps documents whole.
        layouts = (
            [("contiguous", 1)] if cp == 1 or config.schedule in ("local", "ulysses") else _layouts(total // cp, cp)
        )
    schedules: list[dict[str, object]] = [{}]
    if config.schedule == "auto":
        schedules = list(_schedules(cp, heads, per_machine)) if cp > 1 else _alone(layouts[0][0])
    for schedule in schedules:
        whole = schedule.get("schedule") == "ulysses" and config.layout == "auto"
        for layout, width in [("contiguous", 1)] if whole else layouts:
            yield dataclasses.replace(config, layout=layout, width=width, **schedule)  # type: ignore[arg-type]


def _layouts(tokens: int, cp: int) -> list[tuple[str, int]]:
    wide = [tokens // stripes for stripes in STRIPES if tokens // stripes >= LEAST_WIDTH and cp <= MOST_RANKS]
    return [("striped", 1), ("zigzag", 1), ("contiguous", 1), *(("striped", width) for width in wide)]


def _alone(layout: str) -> list[dict[str, object]]:
    return [{"schedule": "local" if layout == "contiguous" else "ring"}]


def _schedules(cp: int, heads: int, per_machine: int) -> Iterator[dict[str, object]]:
    yield {"schedule": "ring"}
    inner = gcd(cp, per_machine)
    if 1 < inner < cp:
        yield {"schedule": "double_ring", "inner": inner}
    yield {"schedule": "all_gather"}
    yield {"schedule": "ulysses"}
    for ulysses in range(2, cp):
        if cp % ulysses == 0 and heads % ulysses == 0:
            for innermost in ("ulysses", "ring"):
                yield {"schedule": "usp", "ulysses": ulysses, "innermost": innermost}


def _mean(predictions: Sequence[Prediction]) -> Prediction:
    """Return the mean over sequences; `sampled` is that of the first."""
    names = ("forward", "backward", "ideal", "compute", "bytes", "far_bytes")
    means = {name: sum(getattr(each, name) for each in predictions) / len(predictions) for name in names}
    means |= {name: round(means[name]) for name in ("bytes", "far_bytes")}
    return dataclasses.replace(predictions[0], **means)  # type: ignore[arg-type]
