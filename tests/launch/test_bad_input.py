"""What cannot be trained on is refused in one message that names what to change; what can be survived is survived.

Every case is a real command in processes of its own. Importing torch is most of a refusal: those of one rank share it.
"""

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from longctx.data.indexed import IndexedWriter, bin_path, idx_path
from tests.support.command_line import environment, train_command
from tests.support.training import TINY, losses, write_corpus

STEPS = ("train.steps=4", "checkpoint.every=2", "checkpoint.keep_last=3")
# In KiB: more than the largest file beside the checkpoints (loss.png), less than a rank's data file in one.
FILE_LIMIT = 150
# Runs at the start of every Python: rank 0 comes last, and its message has to be seen all the same.
LATE_RANK_0 = "import os, time\nif os.environ.get('RANK') == '0':\n    time.sleep(1)\n"
FORKS = """
import json, os, sys
import longctx.train
ends = {}
for folder, overrides in json.loads(sys.argv[1]).items():
    if not os.fork():
        os.chdir(folder)
        for number, stream in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{folder}.{stream}", os.O_WRONLY | os.O_CREAT), number)
        sys.exit(longctx.train.main(overrides))
    ends[folder] = os.waitstatus_to_exitcode(os.wait()[1])
print(json.dumps(ends))
"""


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    status: int
    stdout: str
    stderr: str


@dataclass(frozen=True)
class Refusal:
    """Overrides that are refused ("{inputs}" is a directory), and words of the message, the key to change first."""

    overrides: tuple[str, ...]
    words: tuple[str, ...]
    ranks: int = 1


CORPUS = "data.path={inputs}/text"
TOKENS = ("data=bin", "data.held_out=0")
REFUSALS = {
    "missing corpus": Refusal(("data.path=/nowhere",), ("data.path='/nowhere'", "does not exist")),
    "missing corpus, two ranks": Refusal(("data.path=/nowhere",), ("data.path='/nowhere'", "does not exist"), ranks=2),
    "no file": Refusal(("data.path={inputs}/empty",), ("data.path", "holds no file", "data.glob")),
    "no text": Refusal(("data.path={inputs}/blank",), ("data.path", "holds no documents", "1 empty (a.txt)")),
    "truncated .bin": Refusal((*TOKENS, "data.path={inputs}/torn"), ("data.path", "torn.bin is truncated", "1800")),
    "another .idx": Refusal((*TOKENS, "data.path={inputs}/later"), ("data.path", "version 2; supported: 1")),
    "seq_len": Refusal((CORPUS, "data.seq_len=97"), ("data.seq_len=97", "parallel.cp=2", "96 or 98"), ranks=2),
    "cp": Refusal((CORPUS, "parallel.cp=3"), ("parallel.cp=3", "world of 1 rank", "NPROC=3")),
    "attention": Refusal(
        (CORPUS, "attention=spiral"), ("attention=spiral is not known; known are", "local", "ring", "striped", "zigzag")
    ),
    "schedule": Refusal((CORPUS, "attention.schedule=spiral"), ("attention.schedule=spiral", "ring", "local")),
    "run_dir": Refusal((CORPUS, "run_dir={inputs}/empty.txt/run"), ("run_dir", "cannot be written", "empty.txt/run")),
}


def run(ranks: int, *overrides: str, cwd: Path, path: Path | None = None, file_limit: int | str = "unlimited") -> Done:
    """Run the command to its end.

    `path`: where Python looks for modules first. Files that grow beyond `file_limit` KiB fail as on a full disk.
    """
    env = environment()
    if path is not None:
        env = env | {"PYTHONPATH": os.pathsep.join(filter(None, [str(path), env.get("PYTHONPATH")]))}
    command = train_command(ranks, *TINY, *STEPS, "run_dir=run", *overrides)
    limited = ["bash", "-c", 'ulimit -f "$0" && exec "$@"', str(file_limit), *command]
    done = subprocess.run(limited, cwd=cwd, env=env, capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stdout + done.stderr, done.stdout + done.stderr
    return Done(done.returncode, done.stdout, done.stderr)


def write_inputs(folder: Path) -> None:
    """Write the corpora and token stores of the refusals, and what delays rank 0."""
    (folder / "late").mkdir()
    (folder / "late/sitecustomize.py").write_text(LATE_RANK_0)
    write_corpus(folder / "text")
    (folder / "empty").mkdir()
    (folder / "blank").mkdir()
    (folder / "blank/a.txt").touch()
    (folder / "empty.txt").touch()
    for name in ("torn", "later"):
        with IndexedWriter(folder / name, dtype=np.dtype("uint16")) as writer:
            for length in (300, 200, 400):
                writer.add_document(np.arange(length) % 256)
    torn, index = bin_path(folder / "torn"), idx_path(folder / "later")
    torn.write_bytes(torn.read_bytes()[:-100])
    index.write_bytes(index.read_bytes()[:9] + struct.pack("<Q", 2) + index.read_bytes()[17:])


def run_forked(commands: dict[str, list[str]]) -> dict[str, Done]:
    """Run commands of one rank by their working directories, each in a fork of a process that has imported all."""
    inputs = json.dumps({folder: [*TINY, *STEPS, "run_dir=run", *each] for folder, each in commands.items()})
    forks = [sys.executable, "-c", FORKS, inputs]
    done = subprocess.run(forks, env=environment(), capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    ends = {}
    for folder, status in json.loads(done.stdout).items():
        out, err = (Path(f"{folder}.{stream}").read_text() for stream in ("out", "err"))
        assert "Traceback" not in out + err, out + err
        ends[folder] = Done(status, out, err)
    return ends


@pytest.fixture(scope="module")
def refusals(tmp_path_factory) -> Iterator[Callable[[str], tuple[Path, Done]]]:
    """Give a function that returns the working directory and the end of a refused command."""
    folder = tmp_path_factory.mktemp("refused")
    write_inputs(folder)
    directories = {name: folder / f"case{number}" for number, name in enumerate(REFUSALS)}
    given = {name: [each.format(inputs=folder) for each in case.overrides] for name, case in REFUSALS.items()}
    for directory in directories.values():
        directory.mkdir()
    late = folder / "late"
    with ThreadPoolExecutor(2) as pool:
        alone = pool.submit(run_forked, {str(directories[n]): given[n] for n, c in REFUSALS.items() if c.ranks == 1})
        others = {
            name: pool.submit(run, case.ranks, *given[name], cwd=directories[name], path=late)
            for name, case in REFUSALS.items()
            if case.ranks > 1
        }
        yield lambda name: (
            directories[name],
            others[name].result() if name in others else alone.result()[str(directories[name])],
        )


@pytest.mark.parametrize("name", REFUSALS)
def test_bad_input_is_refused_in_one_message(refusals, name):
    case, (directory, done) = REFUSALS[name], refusals(name)
    assert done.status == 2, done
    message, *others = done.stderr.split("\nlongctx: ")
    assert message.startswith("error: ") and message.count("error: ") == 1, done.stderr
    assert all(words in message for words in case.words), message
    assert [line.endswith("ended with status 2\n") for line in others] == [True] * (case.ranks > 1), done.stderr
    # Nothing is trained, and nothing half-built is left: a prepared corpus is complete, and good for the next try.
    assert "step 1" not in done.stdout
    left = sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
    assert left == [] or [path.rsplit("/", 1)[1] for path in left] == ["metadata.json", "tokens.bin", "tokens.idx"]
    assert not (directory / "run").exists()


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """Give a directory with a corpus and a run of four steps, checkpoints at 2 and 4."""
    directory = tmp_path_factory.mktemp("finished")
    write_corpus(directory / "text")
    done = run(1, "data.path=text", cwd=directory)
    assert (done.status, done.stderr) == (0, ""), done
    return directory


@pytest.fixture
def again(finished, tmp_path) -> Path:
    """Give a copy of that directory, in which the corpus is the same to its file times."""
    return shutil.copytree(finished, tmp_path / "again")


def tree(folder: Path) -> dict[str, bytes]:
    """Return the content of every file but the lock, which names the last process."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "run.lock"
    }


def test_a_checkpoint_of_another_model_is_refused_untouched(again):
    before = tree(again / "run")
    done = run(1, "data.path=text", "train.steps=8", "model.hidden_dim=128", "model.num_layers=2", cwd=again)
    assert done.status == 2, done
    # The first of the two in the order of the model's configuration.
    assert done.stderr.startswith("error: checkpoint of another model: model.num_layers is 1 in the checkpoint, 2 in")
    assert len(done.stderr.splitlines()) == 1 and "checkpoint.resume=never" in done.stderr
    assert tree(again / "run") == before


def test_a_half_written_checkpoint_is_passed_over(again):
    newest = again / "run/checkpoints/iter_0000004"
    part = next(newest.glob("*.distcp"))
    part.write_bytes(part.read_bytes()[:-1000])
    shutil.copytree(newest, newest.with_name("iter_0000006.writing"))
    done = run(1, "data.path=text", "train.steps=8", cwd=again)
    assert (done.status, done.stderr) == (0, ""), done
    assert "checkpoint iter_0000006.writing is an unfinished save: skipped" in done.stdout
    assert "checkpoint iter_0000004 is not complete: " in done.stdout
    assert "resumed from " in done.stdout and "iter_0000002 (step 2, 8 samples seen)" in done.stdout
    assert len(losses(again / "run")) == 8
    kept = sorted(path.name for path in (again / "run/checkpoints").glob("iter_*"))
    assert kept == ["iter_0000004", "iter_0000006", "iter_0000008"]


def test_a_full_disk_costs_the_checkpoint_and_nothing_else(again):
    before = tree(again / "run/checkpoints")
    done = run(2, "data.path=text", "train.steps=8", cwd=again, file_limit=FILE_LIMIT)
    assert (done.status, done.stderr) == (0, ""), done
    for step in (6, 8):
        failed = [line for line in done.stdout.splitlines() if f"checkpoint of step {step} NOT written" in line]
        assert len(failed) == 1 and "EFBIG" in failed[0] and "iter_0000004 is intact" in failed[0], done.stdout
    assert len(losses(again / "run")) == 8
    assert tree(again / "run/checkpoints") == before  # and no part of a new one
    assert "resumed from" in done.stdout and "finished 8 steps" in done.stdout
    # With room again, the run continues from what is there.
    done = run(1, "data.path=text", "train.steps=8", cwd=again)
    assert (done.status, done.stderr) == (0, "") and "(step 4, 16 samples seen)" in done.stdout, done
    assert len(losses(again / "run")) == 8 and (again / "run/checkpoints/iter_0000008").is_dir()
