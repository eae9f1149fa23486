"""Run functions in a process of its own, with Triton's interpreter on or off.

Triton reads `TRITON_INTERPRET` when it decorates a function, so a process has either kernels that run on the CPU or
kernels that compile. Tests that need them ask for a worker:

    def probe(x): ...                               # at module level of the test file

    def test_probe(interpreter):                    # a fixture of this file, imported by the test file
        assert interpreter.run(probe, 3) == ...

Every `torch.empty` in a worker is full of NaN: what a kernel does not write shows. Seed 0 before every task.
"""

import os
import pickle
import runpy
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import pytest

ROOT = Path(__file__).resolve().parents[2]


class Worker:
    """A process that answers one task at a time; started when first needed, and again after it died."""

    def __init__(self, *, interpret: bool) -> None:
        self.interpret = interpret
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process is not None:
            self.process.kill()  # it has nothing to put in order
            self.process.wait()
        self.process = None

    def run(self, function: Callable[..., Any], *args: object) -> Any:
        """Run a module-level function of a test file there; raises `AssertionError` with its traceback if it fails."""
        process = self._started()
        assert process.stdin is not None and process.stdout is not None
        try:
            _send(process.stdin, pickle.dumps((function.__module__, function.__qualname__, args)))
            good, result = pickle.loads(_receive(process.stdout))
        except (EOFError, BrokenPipeError):
            status, self.process = process.wait(timeout=10), None
            raise AssertionError(f"the worker died with status {status} in {function.__qualname__}") from None
        except BaseException:  # a test that was interrupted leaves an answer in the pipe
            process.kill()
            self.process = None
            raise
        assert good, result
        return result

    def _started(self) -> subprocess.Popen[bytes]:
        if self.process is None:
            environment = dict(os.environ, TRITON_INTERPRET="1" if self.interpret else "0", OMP_NUM_THREADS="1")
            environment["PYTHONPATH"] = os.pathsep.join([environment.get("PYTHONPATH", ""), str(ROOT)])
            self.process = subprocess.Popen(
                [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, cwd=ROOT
            )
        return self.process


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Worker]:
    """Give a worker in which Triton's kernels run on the CPU."""
    with Worker(interpret=True) as worker:
        yield worker


@pytest.fixture(scope="session")
def compiler() -> Iterator[Worker]:
    """Give a worker in which Triton's kernels are compiled."""
    with Worker(interpret=False) as worker:
        yield worker


def _send(stream: Any, message: bytes) -> None:
    stream.write(struct.pack("<q", len(message)) + message)
    stream.flush()


def _receive(stream: Any) -> bytes:
    header = stream.read(8)
    if len(header) < 8:
        raise EOFError
    message: bytes = stream.read(struct.unpack("<q", header)[0])
    return message


def _serve() -> None:
    import importlib
    import traceback

    import torch

    sys.path[:] = [folder for folder in sys.path if Path(folder) != Path(__file__).parent]
    runpy.run_path(str(Path(__file__).with_name("worker.py")))["make_tests_importable"]()
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a task prints goes to stderr
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # with it torch fills what it allocates with NaN
    assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    if os.environ["TRITON_INTERPRET"] == "1":
        repair = importlib.import_module("tests.support.triton_interpreter").repair
        repair()
    while True:
        try:
            task = _receive(sys.stdin.buffer)
        except EOFError:
            return
        try:
            module, qualname, args = pickle.loads(task)
            torch.manual_seed(0)
            answer = (True, getattr(importlib.import_module(module), qualname)(*args))
        except BaseException:
            answer = (False, traceback.format_exc())
        _send(answers, pickle.dumps(answer))


if __name__ == "__main__":
    _serve()
