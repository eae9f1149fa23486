"""The library example prints the same losses on one process and on two ranks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "library.py"


@pytest.mark.slow
def test_library_example():
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]

    def run(*command: str) -> list[str]:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=True)
        return [line for line in done.stdout.splitlines() if line.startswith("step")]

    alone = run(sys.executable, str(EXAMPLE))
    assert len(alone) == 6 and float(alone[-1].split()[-1]) < float(alone[0].split()[-1]) - 1
    assert run(*torchrun, "--nproc-per-node", "2", str(EXAMPLE)) == alone
    assert run(*torchrun, "--nproc-per-node", "2", str(EXAMPLE), "ulysses", "contiguous") == alone
