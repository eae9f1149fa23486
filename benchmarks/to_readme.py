"""Write the table of a GPU benchmark's results into README.md, between `<!-- NAME -->` and `<!-- /NAME -->`.

    python benchmarks/to_readme.py benchmarks/results/softmax_gpu.json

NAME is the file's name without its ending. Numbers are never typed in by hand.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from softmax_gpu import speed


def main() -> None:
    """Read, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--readme", type=Path, default=Path(__file__).parents[1] / "README.md")
    options = parser.parse_args()
    try:
        report = json.loads(options.results.read_text())
        report["environment"]["device"], report["settings"]["dtype"], report["rows"], report["matmul_flops"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"{options.results} is no report of softmax_gpu.py: {error!r}") from error
    if "smoke" in report["environment"]["device"]:
        raise SystemExit(f"{options.results} is a smoke test on a CPU: no measurement")
    text = replaced(options.readme.read_text(), options.results.stem, table(report))
    options.readme.write_text(text)


def replaced(text: str, name: str, new: str) -> str:
    """Return the text with `new` between the markers."""
    first, last = f"<!-- {name} -->", f"<!-- /{name} -->"
    if text.count(first) != 1 or text.count(last) != 1:
        raise SystemExit(f"need {first} and {last} once each")
    head, rest = text.split(first)
    return f"{head}{first}\n{new}\n{last}{rest.split(last)[1]}"


def table(report: dict[str, Any]) -> str:
    """Return what was measured as a Markdown table: TFLOP/s of forward and backward together."""
    rows, peak = report["rows"], report["matmul_flops"]
    names, kinds = (list(dict.fromkeys(row[key] for row in rows)) for key in ("problem", "column"))
    found = {(row["problem"], row["column"]): row for row in rows}
    where, settings = report["environment"], report["settings"]
    heads = f"{settings['heads']} heads ({settings['kv_heads']} KV heads) of {settings['head_dim']}"
    lines = [
        f"{where['device']}, torch {where['torch']}, triton {where['triton']}, at {where['longctx']}; "
        f"{settings['dtype']}, {heads}; TFLOP/s, forward + backward, and % of a matrix product's {peak / 1e12:.0f}:",
        "",
        "| | " + " | ".join(kinds) + " |",
        "|" + "---|" * (len(kinds) + 1),
    ]
    for name in names:
        cells = [cell(found.get((name, kind)), peak) for kind in kinds]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cell(row: dict[str, Any] | None, peak: float) -> str:
    """Return one number."""
    if row is None:
        return ""
    told = f"{speed(row, 'both') / 1e12:.0f} ({100 * speed(row, 'both') / peak:.0f} %)"
    return f"{told}; {100 * row['of_ideal']:.0f} % of ideal" if "of_ideal" in row else told


if __name__ == "__main__":
    main()
