"""Start training by its real command line, and find the processes that it becomes."""

import functools
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def train_command(ranks: int, *overrides: str) -> list[str]:
    """Return what launch/train.sh runs; one rank goes without torchrun, which saves its start-up time."""
    module = ["-m", "longctx.train", *overrides]
    if ranks == 1:
        return [sys.executable, *module]
    torchrun = [str(ROOT / "launch/_torchrun.py"), "--standalone", "--local-addr", "127.0.0.1"]
    return [sys.executable, *torchrun, "--nproc-per-node", str(ranks), *module]


@functools.cache
def environment() -> dict[str, str]:
    """Return the environment of such a command: one thread per rank, no GPU, longctx importable from any directory."""
    launcher = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    env = {key: value for key, value in os.environ.items() if key not in launcher}
    env |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    probe = [sys.executable, "-c", "import longctx"]
    if subprocess.run(probe, cwd="/", env=env, stderr=subprocess.DEVNULL).returncode:
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH")]))
    return env


def ranks_of(launcher: int) -> dict[int, int]:
    """Return the process id of every rank that a launcher has started, by rank."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            # After the command's name, which may hold anything: state, parent, ...
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent != launcher:
                continue
            variables = (folder / "environ").read_bytes().split(b"\0")
        except (OSError, IndexError):  # it has just ended
            continue
        ranks = [int(v.removeprefix(b"RANK=")) for v in variables if v.startswith(b"RANK=")]
        if ranks and b"-m\0longctx.train" in (folder / "cmdline").read_bytes():
            found[ranks[0]] = int(folder.name)
    return found


def alive(process: int) -> bool:
    """Tell whether a process runs; one that has ended and was not waited for does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except FileNotFoundError:
        return False
