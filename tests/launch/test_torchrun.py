"""The torchrun wrapper: ranks run, and what ends them is the status and the last line."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

TORCHRUN = Path(__file__).resolve().parents[2] / "launch/_torchrun.py"
SCRIPT = """
import os, signal, sys, time
from pathlib import Path
rank, action = int(os.environ["RANK"]), sys.argv[1]
if action == "note":
    Path(sys.argv[2], f"rank{rank}").write_text(" ".join([os.environ["WORLD_SIZE"], *sys.argv[3:]]))
elif action == "wait":
    Path(sys.argv[2], f"rank{rank}").touch()
    time.sleep(600)
elif rank == 1:
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    sys.exit(2)
else:
    time.sleep(600)
"""


@pytest.fixture
def start(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    standalone = ["--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2"]
    return lambda *args: subprocess.Popen(
        [sys.executable, str(TORCHRUN), *standalone, str(script), *args], stderr=subprocess.PIPE, text=True
    )


def test_ranks_get_their_arguments(start, tmp_path):
    process = start("note", str(tmp_path), "attention=ring", "--flag")
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    assert [(tmp_path / f"rank{rank}").read_text() for rank in (0, 1)] == ["2 attention=ring --flag"] * 2
    assert stderr == ""


@pytest.mark.parametrize(
    ("action", "status", "how"),
    [("exit", 2, "ended with status 2"), ("kill", 128 + signal.SIGKILL, "was killed by SIGKILL")],
)
def test_a_failing_rank_gives_the_status_and_one_line(start, action, status, how):
    process = start(action)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == status
    assert stderr == f"longctx: rank 1 {how}\n"


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_ends_the_ranks_and_is_named(start, tmp_path, name):
    process = start("wait", str(tmp_path))
    deadline = time.monotonic() + 60
    while not all((tmp_path / f"rank{rank}").exists() for rank in (0, 1)) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.Signals[name])
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.Signals[name]
    assert stderr.splitlines()[-1] == f"longctx: stopped by {name}"
    assert "SignalException" not in stderr  # the launcher's stack; a rank that is interrupted may show its own
