"""Resume is exact: a run that was cut continues as if nothing had happened, on this or another mesh."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from tests.support.distributed import RankError
from tests.support.training import held_out_losses, losses, records, run_training, write_corpus

STEPS = ("train.steps=10", "checkpoint.every=5", "checkpoint.keep_last=3")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "text")


def run(pool, world_size: int, run_dir: Path, corpus: Path, *overrides: str) -> None:
    paths = [f"data.path={corpus}", f"data.cache_dir={corpus.parent / 'cache'}", f"run_dir={run_dir}"]
    pool.run(run_training, world_size, [*STEPS, *paths, *overrides])


def cut_after_five(run_dir: Path, copy: Path) -> Path:
    """Copy a finished run as a kill after step 5's checkpoint would have left it: a torn last line included."""
    shutil.copytree(run_dir, copy)
    shutil.rmtree(copy / "checkpoints" / "iter_0000010")
    (copy / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("5")
    lines = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copy / "metrics.jsonl").write_text("".join(lines[:7]) + '{"step": 8, "lo')
    return copy


def tensors(run_dir: Path) -> dict:
    """Return everything in the checkpoint of step 10 by flat name."""
    dcp_to_torch_save(run_dir / "checkpoints" / "iter_0000010", run_dir / "whole.pt")
    return flatten(torch.load(run_dir / "whole.pt", weights_only=False))


def flatten(tree, prefix="") -> dict:
    if isinstance(tree, list) and tree and isinstance(tree[0], dict):
        tree = dict(enumerate(tree))
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {key: value for name, part in tree.items() for key, value in flatten(part, f"{prefix}/{name}").items()}


@pytest.fixture(scope="module")
def undisturbed(gloo_pool, corpus, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "undisturbed"
    run(gloo_pool, 2, run_dir, corpus)
    return run_dir


@pytest.mark.parametrize("extra", ["", "engine.parameters=shard", "engine.dtype=bfloat16", "checkpoint.mode=sync"])
def test_five_and_five_steps_are_ten_bitwise(gloo_pool, undisturbed, corpus, tmp_path, extra):
    whole = undisturbed
    if extra:
        whole = tmp_path / "whole"
        run(gloo_pool, 2, whole, corpus, extra)
    resumed = cut_after_five(whole, tmp_path / "resumed")
    run(gloo_pool, 2, resumed, corpus, *extra.split())
    assert losses(resumed) == losses(whole) and len(losses(whole)) == 10
    assert held_out_losses(resumed) == held_out_losses(whole)
    ours, theirs = tensors(resumed), tensors(whole)
    assert ours.keys() == theirs.keys() and len(ours) > 30
    for name, value in theirs.items():
        same = torch.equal(ours[name], value) if isinstance(value, torch.Tensor) else ours[name] == value
        assert same, name


@pytest.mark.parametrize(
    ("world_size", "extra"),
    [
        (1, "parallel.cp=1"),
        (4, "parallel.cp=4"),
        (4, "parallel.cp=2"),
        (2, "attention=local"),
        (4, "attention=zigzag engine.parameters=shard parallel.cp=2"),
    ],
)
def test_a_checkpoint_continues_on_another_mesh(gloo_pool, undisturbed, corpus, tmp_path, world_size, extra):
    resumed = cut_after_five(undisturbed, tmp_path / "resumed")
    run(gloo_pool, world_size, resumed, corpus, *extra.split())
    for ours, theirs in zip(losses(resumed), losses(undisturbed), strict=True):
        assert abs(ours - theirs) <= 1e-5 * theirs


def test_what_a_checkpoint_holds(undisturbed):
    folder = undisturbed / "checkpoints" / "iter_0000010"
    extra = json.loads((folder / "extra.json").read_text())
    assert extra["step"] == 10 and extra["samples_seen"] == 40 and extra["tokens_seen"] == 40 * 96
    assert extra["config"]["attention"]["layout"] == "striped" and extra["code_version"].startswith("0.1.0")
    names = FileSystemReader(folder).read_metadata().state_dict_metadata
    for part in ("model.embedding.weight", "optimizer.state.embedding.weight.exp_avg", "rng.rank0", "rng.rank1"):
        assert part in names, sorted(names)[:20]
    assert (undisturbed / "checkpoints" / "latest_checkpointed_iteration.txt").read_text().strip() == "10"
    assert (undisturbed / "config.yaml").exists() and (undisturbed / "loss.png").stat().st_size > 5000


def test_a_finished_run_trains_no_further(gloo_pool, undisturbed, corpus, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(undisturbed, again)
    run(gloo_pool, 2, again, corpus)
    assert records(again) == records(undisturbed)
    longer = [*STEPS[1:], "train.steps=12"]
    run(gloo_pool, 2, again, corpus, *longer)
    assert len(losses(again)) == 12


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.hidden_dim=128"], "model.hidden_dim is 64 in the checkpoint, 128 in the config"),
        (["data.seq_len=192"], "data.seq_len is 96 in the checkpoint, 192 in the config"),
        (["train.global_batch=8"], "train.global_batch is 4 in the checkpoint, 8 in the config"),
        (["checkpoint.resume=/nowhere/iter_0000005"], "checkpoint.resume"),
    ],
)
def test_what_does_not_continue_is_refused(gloo_pool, undisturbed, corpus, tmp_path, overrides, message):
    again = cut_after_five(undisturbed, tmp_path / "again")
    with pytest.raises(RankError) as error:
        run(gloo_pool, 2, again, corpus, *overrides)
    assert message in str(error.value) and "ValueError" in str(error.value)


def test_a_half_written_checkpoint_is_passed_over(gloo_pool, undisturbed, corpus, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(undisturbed, again)
    part = next((again / "checkpoints" / "iter_0000010").glob("*.distcp"))
    part.write_bytes(part.read_bytes()[:-100])
    run(gloo_pool, 2, again, corpus)
    assert losses(again) == losses(undisturbed)


def test_never_starts_anew_and_loses_nothing(gloo_pool, undisturbed, corpus, tmp_path):
    again = cut_after_five(undisturbed, tmp_path / "again")
    run(gloo_pool, 2, again, corpus, "checkpoint.resume=never")
    assert losses(again) == losses(undisturbed) and len(records(again)) == len(records(undisturbed))
    assert (again / "before-1" / "checkpoints" / "iter_0000005" / "extra.json").exists()
    assert (again / "before-1" / "metrics.jsonl").exists()


def test_settings_of_the_optimizer_are_those_of_the_config(gloo_pool, undisturbed, corpus, tmp_path):
    again = cut_after_five(undisturbed, tmp_path / "again")
    run(gloo_pool, 2, again, corpus, "optim.weight_decay=0.0", "optim.betas=[0.5,0.6]")
    groups = {name: value for name, value in tensors(again).items() if "param_groups" in name}
    decays = [value for name, value in groups.items() if name.endswith("/weight_decay")]
    betas = [tuple(value) for name, value in groups.items() if name.endswith("/betas")]
    assert decays and set(decays) == {0.0} and set(betas) == {(0.5, 0.6)}
    assert losses(again)[6:] != losses(undisturbed)[6:]


def test_another_initialisation_does_not_matter_to_a_checkpoint(gloo_pool, undisturbed, corpus, tmp_path):
    again = cut_after_five(undisturbed, tmp_path / "again")
    run(gloo_pool, 2, again, corpus, "model.init_std=0.5", "model.head_dim=8")
    assert losses(again) == losses(undisturbed)
