"""Real gloo ranks for tests, started once per session and world size.

    def exchange(rank, world_size, group, scale):          # at module level of the test file
        x = torch.full((2,), float(rank * scale))
        torch.distributed.all_reduce(x, group=group)
        return x

    def test_exchange(gloo_pool):
        for x in gloo_pool.run(exchange, 2, 10):            # one result per rank
            assert x.tolist() == [10.0, 10.0]

Ranks come from a fork server that has torch loaded, so a world costs a fraction of a second after the first. They are
not forked from pytest's process: threads of loggers or checkpoint writers there may hold locks, and a child would wait
for them for ever.

`group` is the default process group, of exactly `world_size` ranks, as FSDP2 and DeviceMesh want it. Return tensors and
assert in the test. Arguments and results are pickled. Every task starts with seed 0 and default dtype float32. After a
failure the world is thrown away, since its ranks may no longer agree on what comes next.
"""

import multiprocessing
import os
import pickle
import runpy
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Self

from tests.support import worker

MAX_WORLD_SIZE = 4
START_TIMEOUT = 120.0
RUN_TIMEOUT = 120.0
# How long the other ranks may go on after one has failed: long enough to fail for the same reason.
GRACE = 5.0


@dataclass(frozen=True)
class Failure:
    """One rank's end: an exception's type, message and traceback, or in words how the process died or hung."""

    kind: str
    message: str
    details: str = ""

    def __str__(self) -> str:
        return f"{self.kind}: {self.message}\n{self.details}".rstrip()


class RankError(AssertionError):
    """Say which ranks failed and how, tracebacks included. `failures` maps rank to `Failure`."""

    def __init__(self, what: str, failures: dict[int, Failure]) -> None:
        self.failures = dict(sorted(failures.items()))
        super().__init__("\n\n".join([what, *(f"rank {rank}: {failure}" for rank, failure in self.failures.items())]))


class World:
    """Hold the processes of one world size, which share a gloo group."""

    def __init__(self, world_size: int) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="longctx-gloo-")
        self.processes: list[BaseProcess] = []
        self.pipes: list[Connection] = []
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch.distributed", "pytest"])
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            arguments = {"rank": rank, "world_size": world_size, "folder": self.folder.name, "pipe": theirs}
            process = context.Process(
                target=runpy.run_path,
                args=(worker.__file__, {"RANK_ARGUMENTS": arguments}, "gloo_worker"),
                daemon=True,
            )
            process.start()
            theirs.close()
            self.processes.append(process)
            self.pipes.append(ours)
        try:
            self.collect(START_TIMEOUT, f"a world of {world_size} ranks did not start")
        except RankError:
            self.kill()
            raise

    def run(self, task: bytes, timeout: float, what: str) -> list[Any]:
        """Send a task to every rank and return their results."""
        for pipe in self.pipes:
            try:
                pipe.send_bytes(task)
            except OSError:  # the process is gone: its pipe says so below
                continue
        return self.collect(timeout, what)

    def collect(self, timeout: float, what: str) -> list[Any]:
        """Wait for a message from each rank and return the results. Raises `RankError` if one has none."""
        results: dict[int, Any] = {}
        failures: dict[int, Failure] = {}
        pending = {pipe: rank for rank, pipe in enumerate(self.pipes)}
        begin = time.monotonic()
        deadline = begin + timeout
        while pending and (ready := wait(list(pending), timeout=max(0.0, deadline - time.monotonic()))):
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank = pending.pop(pipe)
                try:
                    message = pipe.recv_bytes()
                except (EOFError, ConnectionError):
                    failures[rank] = Failure("died", self.epitaph(rank))
                else:
                    body = pickle.loads(message[1:])
                    if message[:1] == worker.RESULT:
                        results[rank] = body
                    else:
                        failures[rank] = Failure(*body)
            if failures:
                deadline = min(deadline, time.monotonic() + GRACE)
        for rank in sorted(pending.values()):
            waited = f"stopped after {time.monotonic() - begin:.1f} s"
            failures[rank] = Failure("no answer", waited, self.stacks(rank))
        if failures:
            raise RankError(what, failures)
        return [results[rank] for rank in range(len(self.pipes))]

    def epitaph(self, rank: int) -> str:
        """Say how a process ended."""
        process = self.processes[rank]
        process.join(timeout=5)
        if process.exitcode is not None and process.exitcode < 0:
            return f"killed by {signal.Signals(-process.exitcode).name}"
        return f"exit status {process.exitcode}"

    def stacks(self, rank: int) -> str:
        """Return where a living process is, thread by thread."""
        pid, path = self.processes[rank].pid, Path(self.folder.name, f"rank{rank}.stacks")
        if pid is None or not path.exists():  # not yet ready for the signal, which would end it
            return ""
        try:
            os.kill(pid, signal.SIGUSR1)
        except ProcessLookupError:
            return ""
        for _ in range(20):
            time.sleep(0.05)
            if text := path.read_text():
                return text
        return ""

    def kill(self) -> None:
        """End the processes at once."""
        for process in self.processes:
            process.kill()
        self.close()

    def close(self) -> None:
        """Ask the processes to end, kill those that do not, and remove the world's folder."""
        for pipe in self.pipes:
            pipe.close()  # a worker takes the end of its pipe as the request
        for process in self.processes:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
                process.join()
        self.folder.cleanup()


class GlooPool:
    """Start worlds when they are first needed, and again after a failure."""

    def __init__(self) -> None:
        self.worlds: dict[int, World] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for world in self.worlds.values():
            world.close()
        self.worlds.clear()

    def run(self, fn: Callable[..., Any], world_size: int, *args: object, timeout: float = RUN_TIMEOUT) -> list[Any]:
        """Run `fn(rank, world_size, group, *args)` on every rank and return the results in the order of ranks.

        `fn` is a module-level function, `timeout` in seconds. Raises `RankError` if any rank raises, dies or hangs.
        """
        if not 1 <= world_size <= MAX_WORLD_SIZE:
            raise ValueError(f"world_size is {world_size}; the pool has 1 to {MAX_WORLD_SIZE} ranks")
        name = f"{fn.__module__}.{fn.__qualname__}"
        if "<" in fn.__qualname__ or fn.__module__ == "__main__":
            raise ValueError(f"{name} cannot be found by another process; define it at module level of the test file")
        task = pickle.dumps((fn.__module__, fn.__qualname__, pickle.dumps(args)))
        if world_size not in self.worlds:
            self.worlds[world_size] = World(world_size)
        try:
            return self.worlds[world_size].run(task, timeout, f"{name} failed on a world of {world_size} ranks")
        except BaseException:  # also when the test itself is interrupted or times out
            self.worlds.pop(world_size).kill()
            raise
