"""Keep metrics.jsonl: one JSON object per line, written at once, each step once also after a resume."""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

Record = dict[str, Any]

# JSON has no word for these. Text keeps them apart from each other, and keeps every reader able to parse the line.
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def encode(record: Mapping[str, Any]) -> bytes:
    """Return `record` as a line of strict JSON; NaN and infinities become the texts "NaN", "Infinity", "-Infinity"."""
    safe: Record = {}
    for key, value in record.items():
        if isinstance(value, float) and not math.isfinite(value):
            value = "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
        safe[key] = value
    return json.dumps(safe, allow_nan=False).encode() + b"\n"


def decode(line: bytes) -> Record | None:
    """Return the record on `line`, or None for a line that is torn (by a kill or a full disk) or not a record.

    A record has a `step` of 1 or more.
    """
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except ValueError:  # also raised for bytes that are no UTF-8
        return None
    if not isinstance(record, dict) or type(record.get("step")) is not int or record["step"] < 1:
        return None
    return {key: _NOT_FINITE.get(value, value) if isinstance(value, str) else value for key, value in record.items()}


def read_records(path: Path) -> Iterator[Record]:
    """Yield the records of a metrics file in order, passing over torn lines. Raise FileNotFoundError without a file."""
    with path.open("rb") as file:
        for line in file:
            record = decode(line)
            if record is not None:
                yield record


def drop_after(path: Path, *, step: int) -> int:
    """Rewrite the file without torn lines and without later steps than `step`; return the number of lines dropped.

    The rewrite is atomic: a kill leaves either the old or the new file. A file with nothing to drop is not touched.
    """
    if not path.exists():
        return 0
    temporary = path.with_name(path.name + ".tmp")
    dropped = 0
    with path.open("rb") as source, temporary.open("wb") as target:
        for line in source:
            record = decode(line)
            if record is None or record["step"] > step:
                dropped += 1
            else:
                target.write(line)
        target.flush()
        os.fsync(target.fileno())
    if dropped:
        temporary.replace(path)
    else:
        temporary.unlink()
    return dropped


class JsonlWriter:
    """Append records to a metrics file.

    Opening it drops the lines of steps after `start_step`, which a run that continues from there will write again.
    `report` is told, once, when writing fails (disk full); the run goes on, and so do later writes.
    """

    def __init__(self, path: Path, *, start_step: int, report: Callable[[str], None]) -> None:
        """Open `path` for appending. Raise OSError if that is not possible."""
        self._path = path
        self._report = report
        self._failed = False
        self._torn = False
        self.dropped = drop_after(path, step=start_step)
        # Unbuffered: a line is with the operating system when write() returns, so that kill -9 cannot lose it.
        self._file: BinaryIO | None = path.open("ab", buffering=0)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record, which holds at least an int `step`."""
        assert self._file is not None, "write after close"
        # What a failed write left behind is half a line: a line break keeps it from spoiling this one.
        line = (b"\n" if self._torn else b"") + encode(record)
        try:
            while line:
                line = line[self._file.write(line) or 0 :]
                self._torn = bool(line)
        except OSError as error:
            self._torn = True
            if not self._failed:
                self._failed = True
                self._report(f"warning: {self._path} could not be written ({error}); the run goes on")

    def close(self) -> None:
        """Close the file. May be called twice."""
        if self._file is not None:
            self._file.close()
            self._file = None
