"""One rank of the gloo pool: take a task from the pipe, run it, send the result back, until told to stop.

Runs by `runpy.run_path` in a child of a fork server, so it is a script: it finds `tests` by its own place, because the
checkout is not on `sys.path` and pytest's importlib mode names test modules as if it were.
"""

import faulthandler
import importlib
import pickle
import signal
import sys
import traceback
import types
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# First byte of a message to the pool; what follows is pickled.
RESULT, ERROR = b"+", b"-"
# Longer than the pool's own patience: the pool's message, with every rank's stack, says more than gloo's.
GROUP_TIMEOUT = timedelta(minutes=30)


def make_tests_importable() -> None:
    """Register the namespace package `tests`, as pytest does in the parent."""
    package = types.ModuleType("tests")
    package.__path__ = [str(Path(__file__).resolve().parents[1])]
    sys.modules["tests"] = package


def find(module: str, qualname: str) -> Callable[..., Any]:
    """Return a function by the names that it has in the parent."""
    found: Any = importlib.import_module(module)
    for name in qualname.split("."):
        found = getattr(found, name)
    return found


def answer(message: bytes, rank: int, world_size: int) -> bytes:
    """Run the task in `message` and return its message to the pool."""
    try:
        torch.manual_seed(0)
        torch.set_default_dtype(torch.float32)
        # The arguments are a pickle in the pickle: unpickling them may import modules, and that may fail.
        module, qualname, arguments = pickle.loads(message)
        result = find(module, qualname)(rank, world_size, dist.group.WORLD, *pickle.loads(arguments))
        return RESULT + pickle.dumps(result)
    except (Exception, SystemExit) as error:
        return ERROR + pickle.dumps((type(error).__name__, str(error), traceback.format_exc()))


def serve(rank: int, world_size: int, folder: str, pipe: Connection) -> None:
    """Join the default process group, then run tasks until an empty message comes or the parent is gone."""
    torch.set_num_threads(1)
    with Path(folder, f"rank{rank}.stacks").open("w") as stacks:
        # When the pool loses patience it asks what every thread is doing; this answers even inside a collective.
        faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
        store = f"file://{folder}/store"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size, timeout=GROUP_TIMEOUT)
        try:
            pipe.send_bytes(RESULT + pickle.dumps(rank))
            while message := pipe.recv_bytes():
                pipe.send_bytes(answer(message, rank, world_size))
        except (EOFError, OSError):
            pass
        dist.destroy_process_group()
        faulthandler.unregister(signal.SIGUSR1)


if __name__ == "gloo_worker":
    make_tests_importable()
    serve(**globals()["RANK_ARGUMENTS"])
