"""A run that is killed again and again ends with the very numbers of a run that nobody touched."""

import json
import os
import random
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

from tests.support.command_line import alive, environment, ranks_of, train_command
from tests.support.training import TINY, records, write_corpus

STEPS, EVERY, KEEP = 160, 2, 2
# When to kill: while the ranks start, after some steps, or when a save has begun.
MOMENTS = ["start"] * 3 + ["step"] * 6 + ["save"] * 10
STEP_LINE = re.compile(rf"^step \d+/{STEPS}  (?!held-out)", re.MULTILINE)
# What depends on nothing but the run's arithmetic; the rest of a line is time.
NUMBERS = ("step", "loss", "grad_norm", "lr", "samples_seen", "tokens_seen", "held_out_loss")


@dataclass(frozen=True, kw_only=True)
class Kill:
    """How one launch ended."""

    moment: str
    rank: int
    status: int
    finished: int  # the newest published step before the launch, 0 for none
    resumed: int  # the step that the launch resumed from, 0 for none
    made: int  # steps that it made
    saving: bool  # a save had begun, and was not published, when the signal was sent
    torn: bool  # that save was never published


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_twenty_kills_change_nothing(tmp_path):
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    corpus = write_corpus(tmp_path / "text")
    overrides = [*TINY, f"train.steps={STEPS}", f"checkpoint.every={EVERY}", f"checkpoint.keep_last={KEEP}"]
    overrides += ["checkpoint.mode=async", "logger.progress=lines"]
    overrides += [f"data.path={corpus}", f"data.cache_dir={tmp_path / 'cache'}"]
    calm = complete([*overrides, f"run_dir={tmp_path / 'calm'}"], tmp_path / "calm")

    killed = Launches([*overrides, f"run_dir={tmp_path / 'killed'}"], tmp_path / "killed", tmp_path / "log", rng)
    # The third save begins when the first one is published: from here on there is something to resume from.
    kills = [killed.kill("save", count=3)]
    for moment in rng.sample(MOMENTS, len(MOMENTS)):
        kills.append(killed.kill(moment, count=rng.randint(1, 7 if moment == "step" else 3)))
    last = complete(killed.overrides, killed.run_dir)

    check_kills(kills)
    assert f"resumed from {killed.run_dir}" in last
    assert calm.count("resumed from") == 0
    check_same_run(tmp_path / "killed", tmp_path / "calm")


def complete(overrides: list[str], run_dir: Path) -> str:
    """Run to the end and return the output."""
    command = train_command(2, *overrides)
    output = subprocess.PIPE
    done = subprocess.run(command, env=environment(), stdout=output, stderr=subprocess.STDOUT, text=True, timeout=400)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}"
    return done.stdout


class Launches:
    """Launch one run over and over, and kill a rank of each launch."""

    def __init__(self, overrides: list[str], run_dir: Path, log: Path, rng: random.Random) -> None:
        self.overrides = overrides
        self.run_dir = run_dir
        self._checkpoints = run_dir / "checkpoints"
        self._log = log
        self._rng = rng

    def kill(self, moment: str, *, count: int) -> Kill:
        """Launch, kill one rank at a moment of this kind, and wait until nothing of the launch is left.

        Args:
            moment: "start": at any time in the first seconds; "step": soon after the `count`-th step; "save": in the
                first milliseconds of the `count`-th save.
        """
        victim, finished = self._rng.randrange(2), self._tracked()
        launched = time.time_ns()
        with self._log.open("wb") as log:
            launcher = subprocess.Popen(
                train_command(2, *self.overrides), env=environment(), stdout=log, stderr=subprocess.STDOUT
            )
        ranks: dict[int, int] = {}
        try:
            self._wait(lambda: ranks.update(ranks_of(launcher.pid)) or len(ranks) == 2, launcher, every=0.02)
            self._wait_for(moment, count, launcher, launched)
            before = self._saves_since(launched)
            os.kill(ranks[victim], signal.SIGKILL)
            status = launcher.wait(timeout=90)
            left = [rank for rank, process in ranks.items() if alive(process)]
        finally:
            for process in [launcher.pid, *ranks.values()]:
                if alive(process):
                    os.kill(process, signal.SIGKILL)
            launcher.wait()
        output = self._output()
        assert not left, f"rank(s) {left} outlived their launcher\n{output}"
        resumed = re.search(r"^resumed from \S+iter_0*(\d+) \(step (\d+),", output, re.MULTILINE)
        assert resumed is None or resumed[1] == resumed[2], output
        kill = Kill(
            moment=moment,
            rank=victim,
            status=status,
            finished=finished,
            resumed=int(resumed[1]) if resumed else 0,
            made=len(STEP_LINE.findall(output)),
            saving=bool(before),
            torn=bool(before & self._saves_since(launched)),
        )
        print(kill)
        # A rank that loses its peer ends with an exception, and may be the first that the launcher sees.
        assert status in (1, 128 + signal.SIGKILL), f"{kill}\n{output}"
        return kill

    def _wait_for(self, moment: str, count: int, launcher: subprocess.Popen, launched: int) -> None:
        if moment == "start":
            time.sleep(self._rng.uniform(0, 2.5))
        elif moment == "step":
            self._wait(lambda: len(STEP_LINE.findall(self._output())) >= count, launcher, every=0.003)
            time.sleep(self._rng.uniform(0, 0.1))
        else:
            seen: set[str] = set()
            self._wait(lambda: seen.update(self._saves_since(launched)) or len(seen) >= count, launcher, every=0.001)
            time.sleep(self._rng.choice([0, self._rng.uniform(0, 0.01), self._rng.uniform(0, 0.05)]))

    def _wait(self, condition: Callable[[], bool], launcher: subprocess.Popen, *, every: float) -> None:
        """Look again and again; fail if the launch ends by itself."""
        deadline = time.monotonic() + 120
        while not condition():
            assert launcher.poll() is None, f"the run ended before it could be killed\n{self._output()}"
            assert time.monotonic() < deadline, f"nothing to kill after 120 s\n{self._output()}"
            time.sleep(every)

    def _saves_since(self, launched: int) -> set[str]:
        """Return the unfinished saves, without what an earlier launch left."""
        found = set()
        for path in self._checkpoints.glob("iter_*.writing"):
            try:
                if path.stat().st_mtime_ns > launched:
                    found.add(path.name)
            except FileNotFoundError:  # it is being published at this moment
                continue
        return found

    def _tracked(self) -> int:
        """Return the step of the newest published checkpoint, 0 if there is none."""
        tracker = self._checkpoints / "latest_checkpointed_iteration.txt"
        return int(tracker.read_text()) if tracker.exists() else 0

    def _output(self) -> str:
        return self._log.read_text(errors="replace")


def check_kills(kills: list[Kill]) -> None:
    """Check that the run was really killed, at moments of all kinds, and each time continued where it had been."""
    summary = "\n".join(map(str, kills))
    assert len(kills) == 20, summary
    assert {kill.rank for kill in kills} == {0, 1}, summary
    assert 3 * sum(kill.torn for kill in kills) >= len(kills), summary
    # Not all in a save, and not all at the same step of a launch or of the run.
    assert sum(not kill.saving for kill in kills) >= 2 and len({kill.made for kill in kills}) >= 4, summary
    assert len({kill.finished for kill in kills}) >= 6, summary
    for kill in kills:
        assert kill.resumed == kill.finished or (kill.moment == "start" and kill.resumed == 0), f"{kill} of\n{summary}"
        assert kill.made > 0 or kill.moment == "start", f"{kill} of\n{summary}"
    assert sum(kill.resumed > 0 for kill in kills) >= 15, summary


def check_same_run(killed: Path, calm: Path) -> None:
    """Check that two runs logged the same numbers, each step once, and ended with the same checkpoint, bit for bit."""
    ours, theirs = (
        [{key: row[key] for key in NUMBERS if key in row} for row in records(run)] for run in (killed, calm)
    )
    assert sum("loss" in row for row in theirs) == STEPS
    for mine, other in zip(ours, theirs, strict=True):
        assert mine == other
    folders = [run / "checkpoints" for run in (killed, calm)]
    names = [sorted(path.name for path in folder.iterdir()) for folder in folders]
    assert names[0] == names[1] and len(names[0]) == KEEP + 1, names
    final = f"iter_{STEPS:07d}"
    saved = [flatten(_load_state_dict_from_keys(checkpoint_id=folder / final)) for folder in folders]
    assert saved[0].keys() == saved[1].keys() and len(saved[0]) > 30
    for name, value in saved[1].items():
        same = torch.equal(saved[0][name], value) if isinstance(value, torch.Tensor) else saved[0][name] == value
        assert same, name
    extra = [json.loads((folder / final / "extra.json").read_text()) for folder in folders]
    for part in extra:
        part["config"].pop("run_dir")
    assert extra[0] == extra[1]


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested dicts by their joined names."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {key: value for name, part in tree.items() for key, value in flatten(part, f"{prefix}/{name}").items()}
