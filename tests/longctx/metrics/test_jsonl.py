"""metrics.jsonl survives kills and full disks, and holds each step once after a resume."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from longctx.metrics.jsonl import JsonlWriter, decode, drop_after, encode, read_records


def _writer(path: Path, *, start_step: int = 0) -> JsonlWriter:
    def fail(text: str) -> None:
        raise AssertionError(text)

    return JsonlWriter(path, start_step=start_step, report=fail)


def _steps(path: Path) -> list[int]:
    return [record["step"] for record in read_records(path)]


def test_line_is_in_the_file_before_close(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = _writer(path)
    writer.write({"step": 1, "loss": 1.5})
    assert path.read_bytes() == b'{"step": 1, "loss": 1.5}\n'
    writer.close()
    writer.close()


def test_numbers_that_json_lacks_come_back(tmp_path: Path) -> None:
    line = encode({"step": 3, "loss": math.nan, "grad_norm": math.inf, "lr": -math.inf})
    assert json.loads(line)["grad_norm"] == "Infinity"
    assert b"NaN" in line
    json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is no strict JSON"))
    record = decode(line)
    assert record is not None
    assert math.isnan(record["loss"])
    assert (record["step"], record["grad_norm"], record["lr"]) == (3, math.inf, -math.inf)


def test_resume_drops_what_will_be_written_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = _writer(path)
    for step in range(1, 7):
        writer.write({"step": step, "loss": float(step)})
        if step % 4 == 0:
            writer.write({"step": step, "held_out_loss": 9.0})
    writer.close()

    writer = _writer(path, start_step=4)
    assert writer.dropped == 2
    for step in range(5, 9):
        writer.write({"step": step, "loss": 10.0 + step})
    writer.close()
    losses = {record["step"]: record["loss"] for record in read_records(path) if "loss" in record}
    assert losses == {1: 1, 2: 2, 3: 3, 4: 4, 5: 15, 6: 16, 7: 17, 8: 18}
    assert _steps(path) == [1, 2, 3, 4, 4, 5, 6, 7, 8]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_fresh_run_drops_all_and_nothing_to_drop_leaves_the_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(encode({"step": 1}) + encode({"step": 2}))
    inode = path.stat().st_ino
    assert drop_after(path, step=2) == 0
    assert path.stat().st_ino == inode
    assert drop_after(path, step=0) == 2
    assert path.read_bytes() == b""
    assert drop_after(tmp_path / "absent", step=0) == 0


@pytest.mark.parametrize(
    "tail",
    [
        b'{"step": 2, "lo',
        b'{"step": 2}',
        b"\0\0\0\0\n",
        b"\xff\xfe\n",
        b"[1]\n",
        b'{"step": true}\n',
        b'{"step": 0}\n',
        b"\n",
    ],
)
def test_torn_line_is_passed_over_and_dropped(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(encode({"step": 1}) + encode({"step": 2}) + tail)
    assert _steps(path) == [1, 2]
    writer = _writer(path, start_step=2)
    assert writer.dropped == 1
    writer.write({"step": 3})
    writer.close()
    assert path.read_bytes() == encode({"step": 1}) + encode({"step": 2}) + encode({"step": 3})


def test_kill_loses_no_written_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    code = (
        "import sys, pathlib\n"
        "from longctx.metrics.jsonl import JsonlWriter\n"
        "writer = JsonlWriter(pathlib.Path(sys.argv[1]), start_step=0, report=print)\n"
        "for step in range(1, 51):\n"
        "    writer.write({'step': step})\n"
        "print('written', flush=True)\n"
        "sys.stdin.read()\n"
    )
    root = Path(__file__).resolve().parents[3]
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=root
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"written\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert _steps(path) == list(range(1, 51))


class _FullDisk:
    """A file that takes `room` bytes and then says that the disk is full."""

    def __init__(self, path: Path, *, room: int) -> None:
        self.descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self.room = room

    def write(self, data: bytes) -> int:
        if not self.room:
            raise OSError(28, "No space left on device")
        count = os.write(self.descriptor, data[: self.room])
        self.room -= count
        return count

    def close(self) -> None:
        os.close(self.descriptor)


def test_full_disk_is_reported_once_and_later_lines_are_whole(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    reports: list[str] = []
    writer = JsonlWriter(path, start_step=0, report=reports.append)
    disk = _FullDisk(path, room=len(encode({"step": 1})) + 5)
    writer._file.close()
    writer._file = disk
    for step in range(1, 4):
        writer.write({"step": step})
    assert len(reports) == 1
    assert "No space left on device" in reports[0]
    disk.room = 1000  # somebody made room
    for step in range(4, 6):
        writer.write({"step": step})
    writer.close()
    assert _steps(path) == [1, 4, 5]
    assert len(reports) == 1
