"""Run `longctx verify` at its smallest, and read its table."""

import re

from longctx import verify
from longctx.verification.report import WIDTHS

SMALL = ("--tokens", "15", "parallel.cp=3", "data.seq_len=768")


def table(capsys, *arguments: str) -> tuple[int, dict[str, str], str]:
    """Return the exit status, the result of every check by its name, and all that was printed."""
    capsys.readouterr()
    status = verify.main([*SMALL, *arguments])
    text = capsys.readouterr().out
    return status, results(text), text


def results(text: str) -> dict[str, str]:
    """Return pass, FAIL or info by the name of the check."""
    rows = [line for line in text.splitlines() if re.search(r" (pass|FAIL|info)$", line)]
    return {row[: WIDTHS[0]].strip(): row.split()[-1] for row in rows}


def failed(found: dict[str, str]) -> set[str]:
    """Return the names of the checks that failed."""
    return {name for name, result in found.items() if result == "FAIL"}
