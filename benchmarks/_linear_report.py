"""Tables, picture and judgement of `linear_cpu.py`."""

import argparse
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

FLAT, SCALES, CHUNKS, FLAT_FROM, SCALES_FROM, KINDS_AT = 0.85, 1.7, 20.0, 8192, 65536, 16384
MB = 1e6
Row = dict[str, Any]


def table(part: str, rows: list[Row], options: argparse.Namespace) -> str:
    """Format what one part measured."""
    head, line = {"lengths": _lengths, "ranks": _ranks, "bytes": _bytes, "kinds": _kinds}[part]
    shape = f"H={options.heads} D={options.head_dim}, float32, forward + backward"
    return "\n".join([f"{part}: {shape}", head, *(line(row) for row in rows)])


def wrong(report: dict[str, Any]) -> list[str]:
    """Return what is not as it should be."""
    found = []
    speeds = [row["tokens"] / row["lightning_s"] for row in report.get("lengths", []) if row["tokens"] >= FLAT_FROM]
    if speeds and min(speeds) < FLAT * max(speeds):
        found.append(f"lightning is not flat: {min(speeds):,.0f} to {max(speeds):,.0f} tokens/s")
    for row in report.get("ranks", []):
        gain = row["one_s"] / row["ranks_s"]
        if (
            row["passing"] != "apart"
            and gain < SCALES
            and row["ranks"] == 2
            and row["tokens"] >= SCALES_FROM
            and not report["ranks_share_cores"]
        ):
            found.append(f"2 ranks, {row['passing']}, {row['tokens']:,} tokens: {gain:.2f} times as fast as one")
    sent: dict[tuple[str, str], Any] = {}
    for row in report.get("bytes", []):
        what = f"{row['kind']} with {row['passing']} at {row['tokens']:,} tokens sent {row['sent']}"
        if row["sent"] != row["formula"]:
            found.append(f"{what}, the formula says {row['formula']}")
        if sent.setdefault((row["kind"], row["passing"]), row["sent"]) != row["sent"]:
            found.append(f"{what}, which is not what it sent at fewer")
    for row in report.get("kinds", []):
        if row["tokens"] != KINDS_AT:
            continue
        if row["heads"] == 1 and row["recurrent_s"] < CHUNKS * row["chunks_s"]:
            found.append(f"{row['kind']} in chunks is only {row['recurrent_s'] / row['chunks_s']:.1f} times as fast")
        if row.get("fla_s", math.inf) < row["chunks_s"]:
            found.append(f"{row['kind']} takes {row['chunks_s']:.3f} s, flash-linear-attention's {row['fla_s']:.3f} s")
    return found


def crossover(rows: list[Row]) -> float | None:
    """Return the length from which lightning is faster than softmax attention, between two lengths that were timed."""
    both = [(row["tokens"], math.log(row["softmax_s"] / row["lightning_s"])) for row in rows if "softmax_s" in row]
    for (short, slower), (long, faster) in pairwise(both):
        if slower < 0 <= faster:
            return float(short * (long / short) ** (slower / (slower - faster)))
    return None


def draw(report: dict[str, Any], path: Path) -> None:
    """Draw tokens per second over lengths, gain of ranks, and kinds against the recurrence: what was measured of it."""
    from matplotlib.figure import Figure

    parts = [part for part in ("lengths", "ranks", "kinds") if report.get(part)]
    if not parts:
        return
    figure = Figure(figsize=(1 + 4.6 * len(parts), 3.9), layout="constrained")
    for axes, part in zip(figure.subplots(1, len(parts), squeeze=False)[0], parts, strict=True):
        rows = report[part]
        if part == "lengths":
            for name, color in (("lightning", "C0"), ("softmax", "C1")):
                own = [row for row in rows if f"{name}_s" in row]
                speed = [row["tokens"] / row[f"{name}_s"] for row in own]
                axes.plot([row["tokens"] for row in own], speed, "o-", ms=4, color=color, label=name)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_xlabel("tokens")
            axes.set_ylabel("tokens/s, one thread")
            cross = crossover(rows)
            axes.set_title("one rank" + (f"; the two cross at {cross:,.0f} tokens" if cross else ""), fontsize=9)
            axes.legend(fontsize=8)
        elif part == "ranks":
            for index, passing in enumerate(dict.fromkeys(row["passing"] for row in rows)):
                own = [row for row in rows if row["passing"] == passing]
                gain = [row["one_s"] / row["ranks_s"] for row in own]
                axes.plot([row["tokens"] for row in own], gain, "osD^"[index % 4] + "-", ms=5, label=passing)
            axes.axhline(rows[0]["ranks"], color="black", lw=0.8, ls=":")
            axes.set_xscale("log", base=2)
            axes.set_ylim(bottom=0)
            axes.set_xlabel("tokens")
            axes.set_title(f"{rows[0]['ranks']} ranks: times as fast as one", fontsize=9)
            axes.legend(fontsize=8)
        else:
            most = max(row["heads"] for row in rows)
            rows = [row for row in rows if row["heads"] == most]
            for index, (name, label) in enumerate((("recurrent_s", "token by token"), ("fla_s", "fla, plain torch"))):
                own = [row for row in rows if name in row]
                at = [rows.index(row) + 0.4 * (index - 0.5) for row in own]
                axes.bar(at, [row[name] / row["chunks_s"] for row in own], width=0.4, label=label)
            axes.axhline(1, color="black", lw=0.8)
            axes.set_yscale("log")
            axes.set_xticks(range(len(rows)), [row["kind"] for row in rows], rotation=40, fontsize=8)
            axes.set_title(f"time over that of our chunks, {rows[0]['tokens']:,} tokens, {most} heads", fontsize=9)
            axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    problem = report["problem"]
    figure.suptitle(
        f"Linear attention on CPU, forward + backward, float32, H={problem['heads']} D={problem['head_dim']}",
        fontsize=10,
    )
    figure.savefig(path, dpi=130)


def _length(row: Row) -> str:
    text = f"{row['tokens']:>8,} {row['lightning_s']:10.4f} {row['tokens'] / row['lightning_s']:12,.0f}"
    text += f" {row['peak_bytes'] / MB:9.1f}"
    return text + (f" {row['softmax_s']:10.4f} {row['tokens'] / row['softmax_s']:12,.0f}" if "softmax_s" in row else "")


def _gain(row: Row) -> str:
    gain = row["one_s"] / row["ranks_s"]
    return f"{row['tokens']:>8,} {row['passing']:>11} {row['one_s']:9.3f} {row['ranks_s']:9.3f} {gain:8.2f}x"


def _traffic(row: Row) -> str:
    same = "as predicted" if row["sent"] == row["formula"] else f"predicted {row['formula']}"
    sent = ", ".join(f"{forward:,} + {backward:,}" for forward, backward in row["sent"])
    return f"{row['kind']:11} {row['tokens']:>8,} {row['passing']:>11}   {sent}   {same}"


def _kind(row: Row) -> str:
    text = f"{row['kind']:11} {row['heads']:>5} {row['tokens']:>8,} {row['chunks_s']:9.3f}"
    text += f" {row['recurrent_s']:11.3f} {row['recurrent_s'] / row['chunks_s']:7.1f}x"
    return text + (f" {row['fla_s']:9.3f} {row['fla_s'] / row['chunks_s']:7.2f}x" if "fla_s" in row else "")


_lengths = (
    f"{'tokens':>8} {'lightning':>10} {'tokens/s':>12} {'peak MB':>9} {'softmax':>10} {'tokens/s':>12}",
    _length,
)
_ranks = f"{'tokens':>8} {'':>11} {'one rank':>9} {'ranks':>9} {'gain':>9}", _gain
_bytes = f"{'':11} {'tokens':>8} {'':>11}   bytes sent, forward + backward, rank by rank", _traffic
_kinds = (
    f"{'':11} {'heads':>5} {'tokens':>8} {'chunks':>9} {'one by one':>11} {'':8} {'fla torch':>9} {'':8}",
    _kind,
)
