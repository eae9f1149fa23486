"""Findings, and the table that shows them: at most 100 columns, coloured on a terminal only."""

import textwrap
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TextIO

WIDTHS = (33, 26, 19, 14, 4)  # name, measured, bound, kernel, result
WIDTH = sum(WIDTHS) + len(WIDTHS) - 1
_COLOURS = {"pass": "\033[32m", "FAIL": "\033[1;31m", "info": "\033[2m"}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one check found.

    Attributes:
        name: of the check; measured, bound: in words, with numbers.
        passed: None = for information only.
        kernel: which local kernel computed it, if one did.
        why: shown on failure: what is wrong where, and what that usually means.
    """

    name: str
    measured: str
    bound: str = ""
    passed: bool | None = True
    kernel: str = ""
    why: str = ""

    @property
    def result(self) -> str:
        """Return the word for the table's last column."""
        return "info" if self.passed is None else "pass" if self.passed else "FAIL"


def at_most(name: str, error: float, bound: float, *, kernel: str = "", why: str = "") -> Finding:
    """Return the finding of an error that must not exceed a bound; NaN does."""
    return Finding(
        name=name, measured=f"{error:.1e}", bound=f"<= {bound:.1e}", passed=error <= bound, kernel=kernel, why=why
    )


def none_wrong(name: str, wrong: int, of: int, *, kernel: str = "", why: str = "", unit: str = "wrong") -> Finding:
    """Return the finding of a count of wrong things that must be 0."""
    return Finding(
        name=name, measured=f"{wrong:,} of {of:,} {unit}", bound="0", passed=wrong == 0, kernel=kernel, why=why
    )


def raised(name: str, error: BaseException) -> Finding:
    """Return the finding of a check that could not be made."""
    text = " ".join(str(error).split()) or "no message"
    return Finding(name=name, measured=f"raised {type(error).__name__}"[: WIDTHS[1]], passed=False, why=text[:400])


def everywhere(findings: Iterable[list[Finding]]) -> list[Finding]:
    """Join what several ranks found by the same checks: the first rank's numbers, or those of one that failed."""
    ranks = list(findings)
    longest = max(ranks, key=len)
    joined = list(longest)
    for rank, found in enumerate(ranks):
        for index, finding in enumerate(found):
            if finding.passed is False and joined[index].passed is not False:
                joined[index] = replace(finding, why=f"[rank {rank}] {finding.why}")
    return joined


class Table:
    """Print findings one after the other, as they come."""

    def __init__(self, stream: TextIO | None) -> None:
        """Take a stream, or None to print nothing (ranks other than the first)."""
        self._stream = stream
        self._colour = stream is not None and stream.isatty()
        self.passed = self.failed = 0

    def say(self, text: str) -> None:
        """Print text as it is."""
        if self._stream is not None:
            print(text, file=self._stream, flush=True)

    def note(self, name: str, text: str) -> None:
        """Print a line under the title, or a few."""
        self.say(textwrap.fill(text, WIDTH, initial_indent=f"  {name:<7} ", subsequent_indent=" " * 10))

    def header(self) -> None:
        """Print the head of the table."""
        self.say(_row("check", "measured", "must be", "kernel", "") + "\n" + "-" * WIDTH)

    def add(self, finding: Finding) -> None:
        """Print one finding, with its explanation if it failed, and count it."""
        self.passed += finding.passed is True
        self.failed += finding.passed is False
        result = finding.result
        row = _row(finding.name, finding.measured, finding.bound, finding.kernel, result)
        if self._colour:
            row = row[: -len(result)] + f"{_COLOURS[result]}{result}\033[0m"
        self.say(row)
        if finding.passed is False and finding.why:
            self.say(textwrap.fill(finding.why, WIDTH, initial_indent="    -> ", subsequent_indent="       "))


def _row(*cells: str) -> str:
    return " ".join(f"{cell:<{width}}" for cell, width in zip(cells, WIDTHS, strict=True)).rstrip()
