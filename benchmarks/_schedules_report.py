"""The table and the figure of `schedules_cpu.py`, from its report."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

MB = 1e6
GROUP = f"{'seconds':>8} {'of ideal':>8} {'MB sent':>8} {'hops':>5} {'peak MB':>8}"


def table(report: dict[str, Any]) -> str:
    """Format the rows for a terminal, 110 columns wide: a block per number of ranks and problem."""
    problem, machine = report["problem"], report["environment"]
    heads = ", ".join(f"{name} {h}:{kv}" for name, (h, kv) in problem["heads"].items())
    lines = [
        f"attention forward + backward, {problem['tokens']:,} tokens, {problem['dtype']}, D={problem['head_dim']}, "
        f"heads {heads}; gloo, 1 thread per rank",
        f"medians of {problem['rounds']} round(s) on {machine['cores']} core(s): {machine['cpu']}, "
        f"torch {machine['torch']}",
        "MB and hops are of both passes and of the rank with the most; every rank's are as predicted",
    ]
    for ranks, case, rows in blocks(report["rows"]):
        shared = f" (share {machine['cores']} cores: times do not scale)" if ranks > machine["cores"] else ""
        lines += ["", f"{ranks} ranks{shared}: {case}"]
        lines += [f"{'':21} {'bound':>6} | " + " | ".join(f"{name:^41}" for name in problem["heads"])]
        lines += [f"{'':21} {'':6} | " + " | ".join([GROUP] * len(problem["heads"]))]
        for schedule in dict.fromkeys(row["schedule"] for row in rows):
            mine = [row for row in rows if row["schedule"] == schedule]
            lines += [
                f"{schedule:21} {mine[0]['percent_of_ideal_bound']:5.0f}% | " + " | ".join(_cells(row) for row in mine)
            ]
    return "\n".join(lines)


def blocks(rows: list[dict[str, Any]]) -> Iterator[tuple[int, str, list[dict[str, Any]]]]:
    """Yield (ranks, problem, rows)."""
    for ranks, case in dict.fromkeys((row["ranks"], row["case"]) for row in rows):
        yield ranks, case, [row for row in rows if (row["ranks"], row["case"]) == (ranks, case)]


def _cells(row: dict[str, Any]) -> str:
    return (
        f"{row['total_s']:8.3f} {row['percent_of_ideal']:7.0f}% {_sent(row) / MB:8.1f} {_hops(row):5} "
        f"{max(row['peak_bytes']) / MB:8.1f}"
    )


def _sent(row: dict[str, Any]) -> int:
    return max(map(sum, zip(row["bytes_forward"], row["bytes_backward"], strict=True)))


def _hops(row: dict[str, Any]) -> int:
    return max(map(sum, zip(row["hops_forward"], row["hops_backward"], strict=True)))


def draw(report: dict[str, Any], path: Path) -> None:
    """Draw % of ideal with its bound, MB sent and peak MB: a row per number of ranks, a bar per schedule."""
    from matplotlib.figure import Figure

    rows, heads = report["rows"], list(report["problem"]["heads"])
    ranks_drawn = sorted({row["ranks"] for row in rows})
    names = list(dict.fromkeys(row["schedule"] for row in rows))
    colors = {name: f"C{index}" for index, name in enumerate(names)}
    panels = {
        "% of ideal (line: bound)": lambda row: row["percent_of_ideal"],
        "MB sent, busiest rank": lambda row: _sent(row) / MB,
        "peak MB, worst rank": lambda row: max(row["peak_bytes"]) / MB,
    }
    figure = Figure(figsize=(15, 3.6 * len(ranks_drawn) + 0.8), layout="constrained")
    grid = figure.subplots(len(ranks_drawn), len(panels), squeeze=False)
    for line, ranks in zip(grid, ranks_drawn, strict=True):
        for axes, (label, value) in zip(line, panels.items(), strict=True):
            place, ticks = 0.0, []
            for _, case, block in (each for each in blocks(rows) if each[0] == ranks):
                schedules = [name for name in names if any(row["schedule"] == name for row in block)]
                ticks.append((place + (len(schedules) - 1) / 2, case))
                for name in schedules:
                    mine = {row["heads"]: row for row in block if row["schedule"] == name}
                    axes.bar(place, value(mine[heads[0]]), color=colors[name], label=name)
                    for other in heads[1:]:
                        axes.plot(place, value(mine[other]), "D", ms=5, mfc="white", mec="black", label=other)
                    if "ideal" in label:
                        edge = mine[heads[0]]["percent_of_ideal_bound"]
                        axes.plot([place - 0.45, place + 0.45], [edge, edge], color="black", lw=1.2)
                    place += 1
                place += 1
            axes.set_xticks([x for x, _ in ticks], [case.replace(", ", ",\n") for _, case in ticks], fontsize=7)
            axes.set_title(f"{ranks} ranks: {label}", fontsize=10)
            axes.grid(axis="y", alpha=0.3)
    legend: dict[str, Any] = {}
    for axes in grid.flat:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            legend.setdefault(label, handle)
    figure.legend(list(legend.values()), list(legend), loc="outside lower center", ncols=len(legend), fontsize=8)
    figure.suptitle(
        f"Schedules on {report['environment']['cores']} CPU cores, {report['problem']['tokens']:,} tokens, "
        f"{report['problem']['dtype']}, forward + backward (bars: {heads[0]})",
        fontsize=11,
    )
    figure.savefig(path, dpi=130)
