"""Full disks, failing ranks and killed ranks: the run goes on, or starts again, from a complete checkpoint."""

import errno
import os
import random
import resource
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint.filesystem as dcp_filesystem

from longctx.checkpoint import CheckpointConfig, Checkpointer
from longctx.checkpoint.choose import newest
from longctx.checkpoint.integrity import problem

NO_LIMIT = resource.RLIM_INFINITY


def _checkpointer(run_dir, messages, **settings):
    return Checkpointer(Path(run_dir), config=CheckpointConfig(**settings), report=messages.append)


def _tensors(step, *, size=50_000):
    return {"w": torch.full((size,), float(step)), "v": torch.full((size,), float(step))}


def _limit_file_size(size):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, NO_LIMIT))


def _small_files(rank, world_size, run_dir, mode):
    messages = []
    checkpointer = _checkpointer(run_dir, messages, mode=mode)
    checkpointer.save(1, _tensors(1), {"step": 1})
    checkpointer.wait()
    for size in (0, 100, 5_000, 200_000):
        if rank == 1:
            _limit_file_size(size)
        checkpointer.save(2, _tensors(2), {"step": 2})
        checkpointer.wait()
        if rank == 0:  # the other one may look when the next save has begun
            names = sorted(path.name for path in (Path(run_dir) / "checkpoints").iterdir())
            assert names == ["iter_0000001", "latest_checkpointed_iteration.txt"]
    _limit_file_size(NO_LIMIT)
    checkpointer.save(3, _tensors(3), {"step": 3})
    checkpointer.wait()
    found = checkpointer.find().name
    checkpointer.close()
    return messages, found


@pytest.mark.parametrize("mode", ["async", "sync"])
def test_a_rank_that_cannot_write_is_reported_and_the_run_goes_on(ranks, tmp_path, mode):
    (messages, found), (silent, _) = ranks.run(_small_files, 2, str(tmp_path), mode)
    assert found == "iter_0000003"
    assert silent == []
    for message in messages[1:5]:
        assert "checkpoint of step 2 NOT written: rank 1: File too large (EFBIG)" in message
        assert "iter_0000001 is intact" in message


class _UnpicklableError(Exception):
    def __init__(self, text):
        super().__init__(text, lambda: None)


class _Uncopyable:
    def __deepcopy__(self, memo):
        raise MemoryError("no memory for a copy")


def _break_write(rank, error):
    original = dcp_filesystem._write_item

    def broken(*args, **kwargs):
        if rank == 1:
            raise error
        return original(*args, **kwargs)

    dcp_filesystem._write_item = broken
    return original


def _one_rank_fails(rank, world_size, run_dir):
    messages = []
    checkpointer = _checkpointer(run_dir, messages)
    for error in (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), _UnpicklableError("odd")):
        original = _break_write(rank, error)
        checkpointer.save(1, _tensors(1), {"step": 1})
        checkpointer.wait()
        dcp_filesystem._write_item = original
    copied = {"object": _Uncopyable()} if rank == 1 else {}
    checkpointer.save(2, {**_tensors(2), **copied}, {"step": 2})
    checkpointer.wait()
    assert checkpointer.find() is None
    checkpointer.save(3, _tensors(3), {"step": 3})
    while checkpointer.current is None:
        checkpointer.poll()
        time.sleep(0.005)
    checkpointer.close()
    return messages


def test_errors_of_one_rank_are_told_in_its_words(ranks, tmp_path):
    full, odd, memory, done = ranks.run(_one_rank_fails, 2, str(tmp_path))[0]
    assert full == (
        "checkpoint of step 1 NOT written: rank 1: No space left on device (ENOSPC) in rank 1's file; "
        "there is no older checkpoint; training goes on"
    )
    assert "rank 1: RuntimeError: _UnpicklableError: ('odd'" in odd
    assert "step 2 NOT written: rank 1: MemoryError: no memory for a copy" in memory
    assert done.startswith("checkpoint iter_0000003 written")


def _rank_0_cannot(rank, world_size, run_dir):
    messages = []
    checkpointer = _checkpointer(run_dir, messages)
    folder = Path(run_dir) / "checkpoints"
    if rank == 0:
        folder.write_text("in the way")
    checkpointer.save(1, _tensors(1), {"step": 1})
    if rank == 0:
        folder.unlink()
    # Writing succeeds, but not the small files that rank 0 adds at the end.
    import longctx.checkpoint.publish as publish

    original = publish.write_synced

    def full(path, text):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    publish.write_synced = full
    checkpointer.save(2, _tensors(2), {"step": 2})
    checkpointer.wait()
    publish.write_synced = original
    left = list(folder.iterdir())
    checkpointer.save(2, _tensors(2), {"step": 2})
    checkpointer.close()
    return messages, left


def test_errors_while_preparing_and_publishing(ranks, tmp_path):
    messages, left = ranks.run(_rank_0_cannot, 2, str(tmp_path))[0]
    assert left == []
    assert "step 1 NOT written: rank 0: File exists (EEXIST) in checkpoints" in messages[0]
    assert "step 2 NOT written: rank 0: No space left on device (ENOSPC) in latest_check" in messages[1]
    assert messages[2].startswith("checkpoint iter_0000002 written")


def _die_while_writing(rank, world_size, run_dir):
    messages = []
    checkpointer = _checkpointer(run_dir, messages)
    checkpointer.save(1, _tensors(1), {"step": 1})
    checkpointer.wait()
    original = dcp_filesystem._write_item

    def killed(*args, **kwargs):
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    dcp_filesystem._write_item = killed
    checkpointer.save(2, _tensors(2), {"step": 2})
    with pytest.raises(RuntimeError, match="step 2 NOT written: the ranks lost touch"):
        checkpointer.wait()
    with pytest.raises(RuntimeError, match="no further checkpoint"):
        checkpointer.save(3, _tensors(3), {"step": 3})
    checkpointer.close()
    # Only now, so that the parent sees the state of a killed job.
    Path(run_dir, "messages.txt").write_text("\n".join(messages))


def _start_again(rank, world_size, run_dir):
    messages = []
    checkpointer = _checkpointer(run_dir, messages)
    found = checkpointer.find()
    tensors = _tensors(0)
    checkpointer.load(found, tensors)
    checkpointer.save(2, _tensors(2), {"step": 2})
    checkpointer.close()
    return found.name, tensors["w"][0].item(), messages


def test_a_rank_killed_while_writing(ranks, tmp_path):
    processes, pipes = ranks.start(_die_while_writing, 2, str(tmp_path))
    assert pipes[0].poll(30)
    processes[1].join(10)
    assert processes[1].exitcode == -signal.SIGKILL
    assert "lost touch" in (tmp_path / "messages.txt").read_text()
    assert (tmp_path / "checkpoints/iter_0000002.writing").is_dir()
    found, value, messages = ranks.run(_start_again, 2, str(tmp_path))[0]
    assert (found, value) == ("iter_0000001", 1.0)
    assert messages[:2] == [
        "checkpoint iter_0000002.writing is an unfinished save: skipped",
        "removed iter_0000002.writing, left by an interrupted save",
    ]


def _save_for_ever(rank, world_size, run_dir, keep_last):
    messages = []
    checkpointer = _checkpointer(run_dir, messages, keep_last=keep_last)
    found = checkpointer.find()
    step = 0
    if found is not None:
        tensors = _tensors(0)
        checkpointer.load(found, tensors)
        step = checkpointer.read_extra(found)["step"]
        assert found.name == f"iter_{step:07d}"
        assert tensors["w"].eq(step).all()
        assert tensors["v"].eq(step).all()
    confirmed = (Path(run_dir) / "confirmed").open("a") if rank == 0 else None
    while True:
        step += 1
        checkpointer.save(step, _tensors(step), {"step": step})
        checkpointer.wait()
        if confirmed:
            print(step, file=confirmed, flush=True)


@pytest.mark.parametrize(("world_size", "keep_last"), [pytest.param(1, 1, marks=pytest.mark.slow), (2, 2)])
def test_killed_at_any_moment_there_is_a_complete_checkpoint(ranks, tmp_path, world_size, keep_last):
    choice = random.Random(world_size)
    interrupted = 0
    for _ in range(15):
        before = (tmp_path / "confirmed").stat().st_size if (tmp_path / "confirmed").exists() else 0
        processes, pipes = ranks.start(_save_for_ever, world_size, str(tmp_path), keep_last)
        deadline = time.monotonic() + 20
        while not (tmp_path / "confirmed").exists() or (tmp_path / "confirmed").stat().st_size == before:
            assert time.monotonic() < deadline
            assert not pipes[0].poll(), pipes[0].recv()
            time.sleep(0.002)
        time.sleep(choice.uniform(0, 0.08))
        for process in choice.sample(processes, len(processes)):
            process.kill()
            time.sleep(choice.choice([0, 0.001, 0.02]))
        for process in processes:
            process.join()
        folder = tmp_path / "checkpoints"
        interrupted += bool(list(folder.glob("*.writing")) + list(folder.glob("*.removing")))
        found = newest(folder, report=lambda message: None)
        assert found is not None
        assert problem(found) is None
        confirmed = int((tmp_path / "confirmed").read_text().split()[-1])
        assert int(found.name[5:]) in (confirmed, confirmed + 1)
    # If no kill fell into a save, this test has shown nothing.
    assert interrupted > 0
