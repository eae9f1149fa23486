"""Two runs cannot share a run directory."""

import subprocess
import sys

import pytest

from longctx.run_lock import lock_run_directory

HOLD = """
import sys, pathlib
from longctx.run_lock import lock_run_directory
lock = lock_run_directory(pathlib.Path(sys.argv[1]), report=print)
print("locked", flush=True)
sys.stdin.read()
"""


def test_a_second_run_is_refused_while_the_first_one_lives(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as first:
        assert first.stdout is not None and first.stdout.readline() == "locked\n"
        with pytest.raises(ValueError, match=rf"is in use by process {first.pid} on .*: wait for it, stop it, or set"):
            lock_run_directory(tmp_path, report=print)
        first.kill()
    lock_run_directory(tmp_path, report=print).close()  # a killed process leaves no lock behind


def test_a_directory_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot be written .*; set run_dir"):
        lock_run_directory(tmp_path / "file" / "run", report=print)
