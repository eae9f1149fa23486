"""Write checkpoints while training goes on, and find and read them again."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load

from longctx.checkpoint.choose import choose, newest
from longctx.checkpoint.config import CheckpointConfig
from longctx.checkpoint.durable import write_synced
from longctx.checkpoint.failure import by_rank, explain
from longctx.checkpoint.integrity import content_problem, problem, read_extra, stored_shapes
from longctx.checkpoint.names import EXTRA, WRITING, checkpoints_directory, name_of
from longctx.checkpoint.partial import Loaded, lacking, leaves
from longctx.checkpoint.publish import prune, publish, put_back, remove_leftovers
from longctx.checkpoint.writer import stage, write
from longctx.parallel.ranks import Ranks


@dataclass(kw_only=True)
class _Outcome:
    """How one save ended, the same on every rank but for the messages, which only rank 0 has."""

    published: bool
    messages: list[str] = field(default_factory=list)
    lost: str | None = None  # why the ranks can no longer talk to each other


class Checkpointer:
    """Own a run's `checkpoints` directory, on all ranks together.

    Rank 0 decides, publishes and reports; all ranks write their parts into one directory, so the run directory has to
    be on storage that they share. Of the methods, the constructor, `save`, `find` and `load` are collective: every rank
    calls them in the same order. `report` is called on rank 0 only, in the thread that calls the method.
    """

    def __init__(self, run_dir: Path, *, config: CheckpointConfig, report: Callable[[str], None]) -> None:
        """Create a process group for checkpoints (collective); touches no file."""
        config.validate()
        self._config = config
        self._run_dir = Path(run_dir).absolute()
        self._folder = checkpoints_directory(self._run_dir)
        self._ranks = Ranks()
        self._tell = report if self._ranks.first else _silent
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._running: Future[_Outcome] | None = None
        self._running_step = 0
        self._lost: str | None = None
        # The checkpoint that this run stands on: read from or written by itself. Saving its step again changes nothing.
        self._current: Path | None = None

    @property
    def current(self) -> Path | None:
        """Return the checkpoint that this run read or published last, None before any."""
        return self._current

    def save(self, step: int, tensors: dict[str, Any], extra: dict[str, Any]) -> None:
        """Save the state of a step (collective); return when it is staged ("async") or written ("sync").

        Waits for the former save first. After the return the tensors may be changed. Errors of writing on any rank are
        reported, not raised: the run goes on with its older checkpoints intact.

        Args:
            step: finished optimizer steps.
            tensors: DCP state dict: nested dicts of tensors, DTensors, bytes and picklable objects.
            extra: JSON-able dict; rank 0's is written.

        Raises:
            TypeError, ValueError: `extra` is not JSON-able, or `step` is negative; on every rank.
            RuntimeError: the ranks lost touch with each other; no checkpoint can be written any more.
        """
        if step < 0:
            raise ValueError(f"step is {step}: need the number of finished steps, >= 0")
        self.wait()
        text, refusal = self._ranks.from_first(lambda: self._prepare(step, extra))
        if refusal is not None:
            self._tell(refusal)
            return
        staged, failure = tensors, None
        if self._config.mode == "async":
            try:
                staged = stage(tensors)
            except Exception as error:
                failure = explain(error)
        # Nobody starts to write, and so to wait for the others, before everybody is known to be able to.
        failures = {rank: reason for rank, reason in enumerate(self._ranks.gather(failure)) if reason is not None}
        if failures:
            if self._ranks.first:
                for message in self._abandon(step, by_rank(failures)):
                    self._tell(message)
            return
        self._running_step = step
        self._running = self._thread.submit(self._write, step, staged, text)
        if self._config.mode == "sync":
            self.wait()

    def poll(self) -> None:
        """Report a save that has ended since the last call; cheap, waits for nothing."""
        if self._running is not None and self._running.done():
            self._settle()

    def wait(self) -> None:
        """Wait for the running save and report it; raise RuntimeError if the ranks lost touch with each other."""
        self._settle()
        if self._lost is not None:
            raise RuntimeError(self._lost)

    def close(self) -> None:
        """Wait for the running save, report it, and give the process group back. Does not raise for a failed save."""
        self._settle()
        self._thread.shutdown(wait=True)
        self._ranks.close()

    def find(self) -> Path | None:
        """Return the checkpoint to continue from, as `checkpoint.resume` asks; None for a fresh start (collective).

        Half-written and damaged checkpoints are passed over for the next older one, each with a message.

        Raises:
            ValueError: `checkpoint.resume` is a path without a complete checkpoint; on every rank.
        """
        return self._ranks.from_first(self._choose)

    def read_extra(self, path: Path) -> dict[str, Any]:
        """Return the `extra` that a checkpoint was saved with; raise ValueError if it cannot be read."""
        return read_extra(path)

    def load(
        self, path: Path, tensors: dict[str, Any], *, may_lack: Callable[[str], bool] = lambda name: False
    ) -> Loaded:
        """Read a checkpoint into a state dict (collective).

        Tensors are filled in place, resharded to the mesh that they have now; other objects are replaced in the dict.

        Args:
            may_lack: tells of a flattened name whether it stays as it is where the checkpoint does not have it, or has
                it in another shape.

        Raises:
            ValueError: anything else that is asked for is not in the checkpoint or has another shape there, or
                something cannot be read; on every rank.
        """
        wanted = leaves(tensors)
        try:
            stored = self._ranks.from_first(lambda: stored_shapes(path))
            left = lacking(wanted, stored, may_lack)
            values = {name: leaf.value for name, leaf in wanted.items() if name not in left}
            load(values, storage_reader=FileSystemReader(path), process_group=self._ranks.group)
        except (CheckpointException, ValueError) as error:
            told = explain(error) if isinstance(error, CheckpointException) else str(error)
            raise ValueError(
                f"checkpoint {path} cannot be loaded: {told}; set checkpoint.resume to an older one"
            ) from error
        for name, value in values.items():
            wanted[name].holder[wanted[name].key] = value
        self._current = Path(path).absolute()
        return Loaded(left=left, unused=tuple(name for name in stored if name not in wanted))

    def _choose(self) -> Path | None:
        if self._config.resume != "never" and self._folder.is_dir():
            try:
                for message in put_back(self._folder):
                    self._tell(message)
            except OSError as error:
                self._tell(f"could not restore an interrupted replacement: {explain(error)}")
        return choose(self._run_dir, resume=self._config.resume, report=self._tell)

    def _prepare(self, step: int, extra: dict[str, Any]) -> tuple[str, str | None]:
        """Make the directory to write into; return extra's text and why there is nothing to write, if so (rank 0)."""
        text = json.dumps(extra, indent=2) + "\n"
        final = self._folder / name_of(step)
        if final == self._current and problem(final) is None:
            return "", f"checkpoint {final.name} is there already: not written again"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            # The former save has ended on every rank (`_write` ends with an exchange), so nobody writes now.
            for message in remove_leftovers(self._folder):
                self._tell(message)
            (self._folder / f"{final.name}{WRITING}").mkdir()
        except OSError as error:
            return "", "\n".join(self._abandon(step, f"rank 0: {explain(error)}"))
        return text, None

    def _write(self, step: int, tensors: dict[str, Any], extra: str) -> _Outcome:
        """Write, publish and prune (all ranks, in the background thread); end at the same time everywhere."""
        started = perf_counter()
        try:
            try:
                write(tensors, directory=self._folder / f"{name_of(step)}{WRITING}", group=self._ranks.group)
                reason = None
            except CheckpointException as error:
                reason = explain(error)
            return self._ranks.from_first(lambda: self._finish(step, extra, reason=reason, started=started))
        except BaseException as error:
            # Not agreed with the other ranks, who may still be writing: leave their files to the next start.
            return _Outcome(published=False, lost=explain(error))

    def _finish(self, step: int, extra: str, *, reason: str | None, started: float) -> _Outcome:
        """Publish what all ranks have written, or clean up after a failure (rank 0)."""
        writing = self._folder / f"{name_of(step)}{WRITING}"
        if reason is None:
            try:
                write_synced(writing / EXTRA, extra)
                # Look through the eyes of the next start, before the name says that all is well. This also catches a
                # run directory that is not on storage shared by all ranks.
                reason = content_problem(writing)
                if reason is None:
                    final = publish(self._folder, step=step)
            except OSError as error:
                reason = f"rank 0: {explain(error)}"
        if reason is not None:
            return _Outcome(published=False, messages=self._abandon(step, reason))
        messages = [f"checkpoint {final.name} written in {perf_counter() - started:.1f} s"]
        messages += prune(self._folder, newest=step, keep_last=self._config.keep_last)
        return _Outcome(published=True, messages=messages)

    def _abandon(self, step: int, reason: str) -> list[str]:
        """Remove a failed save's directory and say what is left to continue from (rank 0)."""
        try:
            intact = newest(self._folder, report=_silent)
            rest = f"{intact.name} is intact" if intact else "there is no older checkpoint"
        except OSError as error:
            rest = f"older checkpoints cannot be looked at: {explain(error)}"
        messages = [f"checkpoint of step {step} NOT written: {reason}; {rest}; training goes on"]
        try:
            messages += [message for message in remove_leftovers(self._folder) if name_of(step) not in message]
        except OSError as error:
            messages.append(f"could not remove {name_of(step)}{WRITING}: {explain(error)}")
        return messages

    def _settle(self) -> None:
        """Wait for the running save and report it."""
        if self._running is None:
            return
        outcome = self._running.result()
        self._running = None
        if outcome.lost is not None:
            self._lost = (
                f"checkpoint of step {self._running_step} NOT written: the ranks lost touch with each other "
                f"({outcome.lost}); no further checkpoint can be written by this process"
            )
            self._tell(self._lost)
        if outcome.published:
            self._current = self._folder / name_of(self._running_step)
        for message in outcome.messages:
            self._tell(message)


def _silent(message: str) -> None:
    """Report nothing."""
