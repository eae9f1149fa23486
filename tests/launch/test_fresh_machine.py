"""The promise of the README on a machine with little on it: clone, run one command, and it works."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# bash, git and coreutils; no compiler, no make, no curl, no flock, no grep.
TOOLS = ("bash", "git", "cat", "cksum", "cut", "dirname", "env", "ls", "mkdir", "rm", "touch", "uname")
# Where pip finds packages and certificates is this machine's affair and stays.
KEPT = ("HOME", "PIP_", "SSL_", "REQUESTS_", "http_", "https_", "HTTP_", "HTTPS_", "no_proxy", "NO_PROXY")


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    """Return a fresh clone and the environment variables of a bare machine."""
    folder = tmp_path_factory.mktemp("machine")
    tools = folder / "bin"
    tools.mkdir()
    for tool in TOOLS:
        (tools / tool).symlink_to(str(shutil.which(tool)))
    (tools / "python3").symlink_to(Path(sys.base_prefix, "bin", f"python3.{sys.version_info.minor}"))
    clone = folder / "longctx"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
    kept = {name: value for name, value in os.environ.items() if name.startswith(KEPT)}
    return clone, kept | {"PATH": str(tools)}


def run(machine, *command):
    clone, environment = machine
    return subprocess.run(command, cwd=clone.parent, env=environment, capture_output=True, text=True, timeout=900)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_clone_installs_itself_and_runs(machine):
    clone, _ = machine
    first = run(machine, f"{clone}/launch/test.sh", "-q", "tests/support/test_tolerance.py")
    assert first.returncode == 0, first.stdout + first.stderr
    assert "passed" in first.stdout

    version = "import torch, longctx.cli; print(torch.__version__)"
    torch = run(machine, f"{clone}/.venv/bin/python", "-c", version)
    assert torch.stdout.startswith("2.13.0"), torch.stdout + torch.stderr

    second = run(machine, f"{clone}/launch/train.sh", "--help")
    assert second.returncode == 0, second.stderr
    assert second.stdout.startswith("usage: longctx train")
    assert second.stderr == ""

    command = run(machine, f"{clone}/.venv/bin/longctx", "--version")
    assert command.stdout.startswith("longctx "), command.stderr
