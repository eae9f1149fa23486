"""Save, find, load and resume on real ranks."""

import random
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint.filesystem as dcp_filesystem
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from longctx.checkpoint import CheckpointConfig, Checkpointer, restore_rng, rng_state


def _checkpointer(run_dir, *, messages=None, **settings):
    config = CheckpointConfig(**{"every": 1, "keep_last": 2, **settings})
    report = messages.append if messages is not None else (lambda message: None)
    return Checkpointer(Path(run_dir), config=config, report=report)


def _extra(step):
    return {"step": step, "data": {"position": 7 * step}}


def _tensors(step, *, size=1000):
    return {"model": {"w": torch.full((size,), float(step))}, "note": {"step": step, "raw": b"\x00\xff"}}


def _training(world_size, *, seed):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(6, 10), torch.nn.GELU(), torch.nn.Linear(10, 3))
    mesh = init_device_mesh("cpu", (world_size,))
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, torch.optim.AdamW(model.parameters(), lr=0.01)


def _steps(model, optimizer, first, last):
    losses = []
    for step in range(first, last):
        # Every rank gets the same batch, so that the mean over ranks doesn't depend on their number.
        data = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
        loss = model(data).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def _save_and_go_on(rank, world_size, run_dir, mode):
    model, optimizer = _training(world_size, seed=1)
    checkpointer = _checkpointer(run_dir, mode=mode)
    assert checkpointer.find() is None
    _steps(model, optimizer, 0, 3)
    weights, moments = get_state_dict(model, optimizer)
    checkpointer.save(3, {"model": weights, "optim": moments, "rng": rng_state(rank)}, _extra(3))
    losses = _steps(model, optimizer, 3, 6)
    checkpointer.wait()
    assert checkpointer.current == Path(run_dir) / "checkpoints/iter_0000003"
    checkpointer.close()
    return losses


def _load_and_go_on(rank, world_size, run_dir):
    model, optimizer = _training(world_size, seed=2)
    checkpointer = _checkpointer(run_dir)
    path = checkpointer.find()
    assert path.name == "iter_0000003"
    assert checkpointer.read_extra(path) == _extra(3)
    weights, moments = get_state_dict(model, optimizer)
    tensors = {"model": weights, "optim": moments}
    checkpointer.load(path, tensors)
    set_state_dict(model, optimizer, model_state_dict=tensors["model"], optim_state_dict=tensors["optim"])
    losses = _steps(model, optimizer, 3, 6)
    checkpointer.close()
    return losses


@pytest.mark.parametrize("mode", ["async", "sync"])
def test_two_ranks_save_fsdp_and_adamw_one_and_two_load(ranks, tmp_path, mode):
    expected = ranks.run(_save_and_go_on, 2, str(tmp_path), mode)[0]
    assert (tmp_path / "checkpoints/latest_checkpointed_iteration.txt").read_text() == "3\n"
    assert ranks.run(_load_and_go_on, 1, str(tmp_path))[0] == pytest.approx(expected, rel=1e-6)
    assert ranks.run(_load_and_go_on, 2, str(tmp_path))[0] == expected


def _mutate_after_save(rank, world_size, run_dir):
    checkpointer = _checkpointer(run_dir)
    mesh = init_device_mesh("cpu", (world_size,))
    plain = torch.ones(100_000)
    sharded = distribute_tensor(torch.ones(10_000), mesh, [Shard(0)])
    # Nothing is written before the tensors have been changed.
    changed = threading.Event()
    original = dcp_filesystem._write_item

    def late(*args, **kwargs):
        assert changed.wait(30)
        return original(*args, **kwargs)

    dcp_filesystem._write_item = late
    checkpointer.save(1, {"plain": plain, "nested": {"sharded": sharded, "list": [1, 2]}}, _extra(1))
    checkpointer.poll()
    assert checkpointer.current is None
    plain.zero_()
    sharded.to_local().zero_()
    changed.set()
    checkpointer.wait()
    tensors = {"plain": torch.zeros_like(plain), "nested": {"sharded": torch.zeros_like(sharded), "list": [0, 0]}}
    checkpointer.load(checkpointer.find(), tensors)
    assert tensors["plain"].eq(1).all()
    assert tensors["nested"]["sharded"].to_local().eq(1).all()
    assert tensors["nested"]["list"] == [1, 2]
    checkpointer.close()


def test_tensors_may_change_right_after_save(ranks, tmp_path):
    ranks.run(_mutate_after_save, 2, str(tmp_path))


def _many_saves(rank, world_size, run_dir):
    messages = []
    checkpointer = _checkpointer(run_dir, messages=messages, keep_last=2)
    for step in (10, 20, 30, 40):
        checkpointer.save(step, _tensors(step), _extra(step))
        checkpointer.poll()
    # Published already: nothing to do, also not an error.
    checkpointer.save(40, _tensors(0), _extra(40))
    checkpointer.wait()
    tensors = _tensors(0)
    checkpointer.load(checkpointer.find(), tensors)
    assert tensors["note"] == {"step": 40, "raw": b"\x00\xff"}
    assert tensors["model"]["w"].eq(40).all()
    checkpointer.close()
    return messages


def test_keep_last_and_saving_a_step_twice(ranks, tmp_path):
    messages, silent = ranks.run(_many_saves, 2, str(tmp_path))
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["iter_0000030", "iter_0000040", "latest_checkpointed_iteration.txt"]
    assert [m.split(" written")[0] for m in messages[:4]] == [f"checkpoint iter_00000{s}0" for s in (1, 2, 3, 4)]
    assert messages[4:] == ["checkpoint iter_0000040 is there already: not written again"]
    assert silent == []


def _back_to_20(rank, world_size, run_dir):
    first = _checkpointer(run_dir, keep_last=3)
    for step in (20, 30, 40):
        first.save(step, _tensors(step), _extra(step))
    first.close()
    messages = []
    second = _checkpointer(run_dir, messages=messages, keep_last=3, resume=f"{run_dir}/checkpoints/iter_0000020")
    path = second.find()
    second.load(path, _tensors(0))
    # Another history: step 30 is written anew over the old one, and the older future at 40 is not taken for newer.
    second.save(30, _tensors(-30), _extra(30))
    second.close()
    third = _checkpointer(run_dir, messages=messages)
    found = third.find()
    tensors = _tensors(0)
    third.load(found, tensors)
    third.close()
    return path.name, found.name, tensors["model"]["w"][0].item(), messages


def test_a_step_of_an_abandoned_future_is_replaced(ranks, tmp_path):
    path, found, value, messages = ranks.run(_back_to_20, 1, str(tmp_path))[0]
    assert (path, found, value) == ("iter_0000020", "iter_0000030", -30.0)
    assert "iter_0000040 passed over" in messages[-1]
    assert "checkpoint.resume" in messages[-1]
    assert not list((tmp_path / "checkpoints").glob("*.replaced"))


def _bad_resume(rank, world_size, run_dir):
    texts = []
    for resume in (f"{run_dir}/nowhere", run_dir):
        checkpointer = _checkpointer(run_dir, resume=resume)
        with pytest.raises(ValueError, match=r"checkpoint\.resume") as caught:
            checkpointer.find()
        texts.append(str(caught.value))
        checkpointer.close()
    checkpointer = _checkpointer(run_dir)
    with pytest.raises(TypeError, match="JSON"):
        checkpointer.save(1, _tensors(1), {"step": object()} if rank == 0 else {})
    checkpointer.save(1, _tensors(1), _extra(1))
    checkpointer.wait()
    for tensors in ({"other": torch.zeros(3)}, {"model": {"w": torch.zeros(4)}}):
        with pytest.raises(ValueError, match="iter_0000001 cannot be loaded: rank 0 and 1 more") as caught:
            checkpointer.load(checkpointer.find(), tensors)
        texts.append(str(caught.value))
    checkpointer.close()
    return texts


def test_errors_are_the_same_on_every_rank(ranks, tmp_path):
    first, second = ranks.run(_bad_resume, 2, str(tmp_path))
    assert first == second
    assert "there is no such directory" in first[0]
    assert "no complete checkpoint" in first[1]
    assert "other" in first[2]
    assert "model.w" in first[3]


def _draw():
    return torch.rand(3).tolist(), np.random.rand(3).tolist(), [random.random() for _ in range(3)]  # noqa: NPY002


def _save_rng(rank, world_size, run_dir):
    torch.manual_seed(rank)
    np.random.seed(rank)  # noqa: NPY002
    random.seed(rank)
    _draw()
    checkpointer = _checkpointer(run_dir)
    checkpointer.save(5, {"rng": rng_state(rank), **_tensors(5)}, _extra(5))
    drawn = _draw()
    checkpointer.close()
    return drawn


def _load_rng(rank, world_size, run_dir):
    messages = []
    checkpointer = _checkpointer(run_dir)
    path = checkpointer.find()
    drawn = []
    for _ in range(2):
        restore_rng(path, rank=rank, world_size=world_size, seed=3, step=5, report=messages.append)
        drawn.append(_draw())
    assert drawn[0] == drawn[1]
    checkpointer.close()
    return drawn[0], messages


def test_random_states_return_and_new_ranks_are_seeded(ranks, tmp_path):
    expected = ranks.run(_save_rng, 2, str(tmp_path))
    (a, told), (b, _), (c, silent) = ranks.run(_load_rng, 3, str(tmp_path))
    assert [a, b] == expected
    assert all(x not in (y, z) for x, y, z in zip(c, a, b, strict=True))
    assert silent == []
    assert "no random state for rank 2" in told[0]
    assert [drawn for drawn, _ in ranks.run(_load_rng, 1, str(tmp_path))] == expected[:1]


def test_config_names_the_key():
    CheckpointConfig().validate()
    for key, value in {"every": -1, "keep_last": 0, "resume": " ", "mode": "later"}.items():
        with pytest.raises(ValueError, match=rf"checkpoint\.{key}"):
            CheckpointConfig(**{key: value}).validate()


def _is_initialized(rank, world_size):
    return dist.get_world_size()


def test_ranks_fixture_reports_the_world(ranks):
    assert ranks.run(_is_initialized, 2) == [2, 2]
