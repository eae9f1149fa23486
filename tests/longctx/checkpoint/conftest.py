"""Real gloo ranks in processes of their own, which a test may kill."""

import multiprocessing
import runpy
import uuid
from pathlib import Path

import pytest

_ENTRY = str(Path(__file__).with_name("_rank_main.py"))
_PRELOAD = ["torch", "torch.distributed.checkpoint", "torch.distributed.fsdp", "pytest", "longctx.checkpoint"]


class Ranks:
    """Start functions `fn(rank, world_size, *args)` of a test module, one process per rank."""

    def __init__(self, folder):
        # Not plain fork: the parent may have run threads. The fork server imports torch once, then a rank costs 0.05 s.
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(_PRELOAD)
        self._folder = folder
        self._started = []

    def start(self, fn, world_size, *args):
        """Start the ranks; return their processes and the pipes that will hold (succeeded, result or traceback)."""
        init = self._folder / f"rendezvous_{uuid.uuid4().hex}"
        processes, pipes = [], []
        for rank in range(world_size):
            receive, send = self._context.Pipe(duplex=False)
            job = {
                "file": fn.__code__.co_filename,
                "function": fn.__name__,
                "rank": rank,
                "world_size": world_size,
                "init": str(init),
                "arguments": args,
                "results": send,
            }
            process = self._context.Process(target=runpy.run_path, args=(_ENTRY, {"RANK": job}), daemon=True)
            process.start()
            send.close()
            processes.append(process)
            pipes.append(receive)
        self._started += processes
        return processes, pipes

    def run(self, fn, world_size, *args, timeout=60):
        """Run the ranks to their end; return their results in rank order."""
        _, pipes = self.start(fn, world_size, *args)
        results = []
        for rank, pipe in enumerate(pipes):
            assert pipe.poll(timeout), f"rank {rank} of {fn.__name__} hangs"
            results.append(pipe.recv())
        failed = [
            f"rank {rank} of {fn.__name__}:\n{text}" for rank, (succeeded, text) in enumerate(results) if not succeeded
        ]
        assert not failed, "\n".join(failed)
        return [value for _, value in results]

    def close(self):
        for process in self._started:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()


@pytest.fixture
def ranks(tmp_path_factory):
    pool = Ranks(tmp_path_factory.mktemp("ranks"))
    yield pool
    pool.close()
