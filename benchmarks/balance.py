"""Balance of token layouts on packed documents: what the plan predicts, and what a run of the composition counts.

    python benchmarks/balance.py               # 131,072 tokens on 8 ranks, 8 draws of each mix, a minute
    python benchmarks/balance.py --draws 1     # ten seconds

Three mixes of document lengths are packed without padding, and every document attends causally to itself:

    web     short web pages: uniform between 64 and 2,048 tokens
    code    files of code: log-normal, exp N(7.6, 1.3), at most a quarter of the sequence
    mixed   many notes and a few books: 95% as web, 5% a quarter of the sequence

predicted   ideal / critical path from the plan's integers (`parallel/balance.py`): all visible pairs shared evenly,
            over the sum over hops of the busiest rank's pairs; for a ring, whose ranks wait for each other at every hop
counted     the same from a forward pass over simulated ranks, whose kernel sees positions instead of queries and keys,
            and counts which of the pairs of each tile the mask lets through. Pairs must be the predicted ones for every
            rank and hop, and those of all documents in sum: the run fails otherwise, and where token-striping is below
            99% of ideal

Nothing here depends on the machine. JSON and PNG go to --out.
"""

import argparse
import random
import statistics
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from _ranks import write_report
from torch import Tensor

from longctx.attention_function import Attention, Call
from longctx.kernels.contract import Request, Scores
from longctx.kernels.mask import causal, documents
from longctx.kernels.merge import Partial
from longctx.kernels.positions import Tile
from longctx.kernels.softmax.by_lists import ByLists
from longctx.parallel.balance import Balance, balance_of, plans_of_all_ranks
from longctx.parallel.heads import HeadSplit
from longctx.parallel.layout import Layout
from longctx.parallel.loopback import LoopbackTransport, run_ranks
from longctx.parallel.plan import Plan
from longctx.parallel.schedules.ring import Ring

RANKS = 8
LAYOUTS = {
    "striped(1)": ("striped", 1),
    "striped(64)": ("striped", 64),
    "striped(128)": ("striped", 128),
    "zigzag": ("zigzag", 1),
    "contiguous": ("contiguous", 1),
}
BEST, LEAST = "striped(1)", 0.99
NUMBERS = ("predicted", "counted", "busiest", "idle")


def main() -> None:
    """Count, print the table, write JSON and PNG; fail where something is not as it must be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--draws", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/balance.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [measure(mix, name, tokens=options.tokens, draws=options.draws) for mix in MIXES for name in LAYOUTS]
    report = {"tokens": options.tokens, "ranks": RANKS, "draws": options.draws, "schedule": "ring", "rows": rows}
    print(table(report))
    write_report(options.out, report)
    draw(report, options.out.with_suffix(".png"))
    low = [row["mix"] for row in rows if row["layout"] == BEST and min(row["predicted"], row["counted"]) < LEAST]
    if low:
        raise SystemExit(f"{BEST} is below {LEAST:.0%} of ideal on {', '.join(low)}")


def web(generator: random.Random, tokens: int) -> int:
    """Return the length of a short web page."""
    return generator.randint(64, 2048)


def code(generator: random.Random, tokens: int) -> int:
    """Return the length of a file of code."""
    return min(int(generator.lognormvariate(7.6, 1.3)) + 1, tokens // 4)


def mixed(generator: random.Random, tokens: int) -> int:
    """Return the length of a note, or of a book."""
    return tokens // 4 if generator.random() < 0.05 else web(generator, tokens)


MIXES: dict[str, Callable[[random.Random, int], int]] = {"web": web, "code": code, "mixed": mixed}


def packed(mix: str, *, tokens: int, seed: int) -> tuple[int, ...]:
    """Return the bounds of documents that fill a sequence; the last one is cut off."""
    generator, bounds = random.Random(f"{mix} {seed}"), [0]
    while bounds[-1] < tokens:
        bounds.append(min(bounds[-1] + MIXES[mix](generator, tokens), tokens))
    return tuple(bounds)


def measure(mix: str, name: str, *, tokens: int, draws: int) -> dict[str, Any]:
    """Return the means over draws of one layout on one mix."""
    label, width = LAYOUTS[name]
    layout = Layout(label, RANKS, width)  # type: ignore[arg-type]
    found: dict[str, list[float]] = {number: [] for number in NUMBERS}
    for seed in range(draws):
        bounds = packed(mix, tokens=tokens, seed=seed)
        plans = plans_of_all_ranks(layout, [causal() & documents(bounds)], Ring(), total=tokens)
        predicted, counted = balance_of(plans), count(plans, bounds)
        visible = sum(length * (length + 1) // 2 for length in (end - begin for begin, end in pairwise(bounds)))
        assert predicted.total == visible, (mix, name, seed, predicted.total, visible)
        assert counted == predicted, f"{mix}, {name}, draw {seed}: counted {counted}, predicted {predicted}"
        values = predicted.efficiency, counted.efficiency, counted.imbalance, counted.idle_hops
        for number, value in zip(NUMBERS, values, strict=True):
            found[number].append(value)
    means = {number: round(statistics.mean(values), 4) for number, values in found.items()}
    return {"mix": mix, "layout": name, **means, "lowest": round(min(found["counted"]), 4)}


def count(plans: Sequence[Plan], bounds: Sequence[int]) -> Balance:
    """Run the composition on simulated ranks and count the visible pairs of every rank and hop."""
    layout, total = plans[0].layout, plans[0].total
    own = [layout.positions(rank, total) for rank in range(layout.cp)]
    owner = torch.empty(total, dtype=torch.int64)
    for rank, positions in enumerate(own):
        owner[positions] = rank
    begins = torch.tensor(bounds)

    def run(transport: LoopbackTransport) -> tuple[int, ...]:
        plan, kernel = plans[transport.rank], CountingKernel(owner, begins)
        x = own[transport.rank].double()[None, :, None, None]
        call = Call(
            layout=layout,
            schedule=plan.schedule,
            total=total,
            plan=plan,
            transport=transport,
            kernel=kernel,
            scores=Scores(softmax_scale=1.0),
            split=HeadSplit(1, 1, 1),
            moves_queries=False,
            wants_lse=False,
        )
        with torch.no_grad():
            Attention.apply(x, x, x, None, call)
        return tuple(kernel.pairs[hop.source] for hop in plan.hops)

    return Balance(tuple(run_ranks(layout.cp, run)))


class CountingKernel(ByLists):
    """A local kernel whose q and k are global positions `[1, T, 1, 1]`, exact in float64: it counts, by owner of k."""

    name = "counting"

    def __init__(self, owner: Tensor, begins: Tensor) -> None:
        """Take the rank that owns each position, and the documents' bounds; both int64."""
        self.pairs = [0] * (1 + int(owner.max()))
        self._owner, self._begins = owner, begins

    def unsupported(self, request: Request) -> str | None:
        """Serve everything."""
        return None

    def _forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, tiles: Sequence[Tile], scores: Scores, partial: Partial
    ) -> None:
        """Count the pairs of each tile that are in one document, the key not after the query."""
        assert torch.equal(k, v), "v travels with k"
        queries, keys = (x.flatten().long() for x in (q, k))
        own, source = self._begins, int(self._owner[keys[0]])
        assert (self._owner[keys] == source).all()
        begins = own[torch.searchsorted(own, queries, right=True) - 1]
        for tile in tiles:
            seen, rows = keys[tile.columns], queries[tile.rows]
            up_to = torch.searchsorted(seen, rows, right=True)
            before = torch.searchsorted(seen, begins[tile.rows])
            self.pairs[source] += int((up_to - before).clamp(min=0).sum())

    def _backward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        tiles: Sequence[Tile],
        scores: Scores,
        dout: Tensor,
        delta: Tensor,
        lse: Tensor,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
    ) -> None:
        """Never called."""
        raise AssertionError(self)


def table(report: dict[str, Any]) -> str:
    """Format the rows for a terminal."""
    lines = [
        f"{report['tokens']:,} tokens on {report['ranks']} ranks, ring; % of ideal, means over {report['draws']} draws",
        "",
        f"{'':16}{'predicted':>10}{'counted':>10}{'lowest':>10}{'busiest rank':>15}{'idle hops':>12}",
    ]
    for row in report["rows"]:
        if row["layout"] == BEST:
            lines.append(row["mix"])
        lines.append(
            f"  {row['layout']:14}{row['predicted']:>10.1%}{row['counted']:>10.1%}{row['lowest']:>10.1%}"
            f"{row['busiest']:>12.2f} x {row['idle']:>12.0%}"
        )
    return "\n".join(lines)


def draw(report: dict[str, Any], path: Path) -> None:
    """Draw what was counted as bars and what was predicted as lines across them."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4))
    width, mixes = 0.8 / len(LAYOUTS), list(MIXES)
    for index, name in enumerate(LAYOUTS):
        rows = [row for row in report["rows"] if row["layout"] == name]
        at = [place + (index - (len(LAYOUTS) - 1) / 2) * width for place in range(len(mixes))]
        bars = axes.bar(at, [100 * row["counted"] for row in rows], width=0.9 * width, label=name)
        axes.bar_label(bars, fmt="%.0f", fontsize=7, padding=2)
        for x, row in zip(at, rows, strict=True):
            known = {"label": "predicted"} if (name, row["mix"]) == ("contiguous", mixes[-1]) else {}
            axes.hlines(100 * row["predicted"], x - 0.45 * width, x + 0.45 * width, color="black", **known)
    axes.axhline(100, color="gray", linewidth=0.8)
    axes.set_xticks(range(len(mixes)), ["web: short pages", "code: log-normal", "mixed: notes and books"])
    axes.set_ylabel("% of ideal (bars: counted)")
    axes.set_ylim(0, 112)
    axes.set_title(
        f"Packed documents, {report['tokens']:,} tokens on {report['ranks']} ranks, causal, ring", fontsize=10
    )
    axes.legend(fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.1), frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=150, metadata={"Software": ""})
    plt.close(figure)


if __name__ == "__main__":
    main()
