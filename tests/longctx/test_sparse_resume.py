"""A model continues with sparse attention where it had dense, and back; the same layers resume exactly."""

import contextlib
import io
import json
import shutil
from pathlib import Path

import pytest
import torch

from longctx.model import ModelConfig, initial_weight
from tests.longctx.test_resume import cut_after_five, tensors
from tests.longctx.test_sparse_training import SHORT, STACKS, stack
from tests.support.distributed import RankError
from tests.support.training import losses, run_training, write_corpus

STEPS = "train.steps=10 checkpoint.every=5 checkpoint.keep_last=3 train.eval_samples=0 optim.schedule=cosine"
FULL = "attention=zigzag attention.layers=[full,full] model.num_layers=2"
ALL_BLOCKS = "mixers.moba.block_size=8 mixers.moba.topk=16"
MOBA = f"attention=zigzag attention.layers=[moba,moba] model.num_layers=2 {ALL_BLOCKS}"
# Without clipping: the norm is that of all gradients, those of the gates too.
SEER = f"attention=zigzag {stack('seer', 'seer')} mixers.seer.topk=16 optim.clip_grad_norm=0"
SPARSE_SEER = f"{SEER} mixers.seer.mode=sparse"
NSA = f"attention=zigzag {stack('full', 'nsa')}"
GATES = "blocks.1.attention.sparse.branch_gates.weight"
EXACT = "engine.dtype=float64"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "text")


def listen(rank: int, world_size: int, group: object, overrides: list[str]) -> str:
    """Train, and return what was printed."""
    with contextlib.redirect_stdout(io.StringIO()) as told:
        run_training(rank, world_size, group, overrides)
    return told.getvalue()


def run(pool, world_size: int, corpus: Path, run_dir: Path, *overrides: str) -> str:
    """Return what the first rank printed; the others are silent."""
    paths = [f"data.path={corpus}", f"data.cache_dir={corpus.parent / 'cache'}", f"run_dir={run_dir}"]
    given = [each for override in (SHORT, STEPS, *overrides) for each in override.split()]
    first, *others = pool.run(listen, world_size, [*paths, *given])
    assert not any(others)
    return first


def near(ours: list[float], theirs: list[float], tolerance: float) -> None:
    assert len(ours) == len(theirs) >= 6
    for one, other in zip(ours, theirs, strict=True):
        assert abs(one - other) <= tolerance * abs(other), (ours, theirs)


@pytest.fixture(scope="module")
def trained(gloo_pool, corpus, tmp_path_factory):
    """Return the run directory of ten undisturbed steps on two ranks."""
    done = {}

    def get(*overrides: str) -> Path:
        if overrides not in done:
            done[overrides] = tmp_path_factory.mktemp("runs") / "undisturbed"
            run(gloo_pool, 2, corpus, done[overrides], *overrides)
        return done[overrides]

    return get


@pytest.mark.parametrize(
    "overrides",
    [
        "many",
        *(
            pytest.param(each, marks=pytest.mark.slow)
            for each in ("more", "many engine.parameters=shard", "many engine.dtype=bfloat16", "seer", "sla", "sinks")
        ),
    ],
)
def test_five_and_five_steps_are_ten_bitwise(gloo_pool, trained, corpus, tmp_path, overrides):
    name, *extra = overrides.split()
    given = (STACKS[name], "attention=zigzag", *extra)
    whole = trained(*given)
    resumed = cut_after_five(whole, tmp_path / "resumed")
    told = run(gloo_pool, 2, corpus, resumed, *given)
    assert "resumed from" in told and "note: the checkpoint" not in told and "begin with" not in told
    assert losses(resumed) == losses(whole) and len(losses(whole)) == 10
    ours, theirs = tensors(resumed), tensors(whole)
    assert ours.keys() == theirs.keys() and any("attention.sparse." in key for key in ours)
    for key, value in theirs.items():
        assert torch.equal(ours[key], value) if isinstance(value, torch.Tensor) else ours[key] == value, key


@pytest.mark.parametrize(
    ("world_size", "extra"),
    [
        (1, "attention=local"),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in [
                (4, "attention=zigzag engine.parameters=shard"),
                (4, "attention=ulysses parallel.cp=2"),
                (4, "attention=striped attention.width=16 attention.kv_moves=blocks"),
            ]
        ),
    ],
)
def test_sparse_layers_continue_on_another_mesh(gloo_pool, trained, corpus, tmp_path, world_size, extra):
    whole = trained(STACKS["many"], "attention=zigzag")
    resumed = cut_after_five(whole, tmp_path / "resumed")
    run(gloo_pool, world_size, corpus, resumed, extra, STACKS["many"])
    near(losses(resumed), losses(whole), 1e-5)


@pytest.mark.parametrize(
    ("dtype", "tolerance", "world_size", "extra"),
    [
        ("float64", 1e-10, 1, "engine.parameters=shard"),
        pytest.param("float32", 1e-6, 2, "attention.kv_moves=blocks", marks=pytest.mark.slow),
        pytest.param("float64", 1e-10, 4, "engine.parameters=shard parallel.cp=2", marks=pytest.mark.slow),
    ],
)
def test_full_then_moba_of_all_blocks_then_full(
    gloo_pool, trained, corpus, tmp_path, dtype, tolerance, world_size, extra
):
    precise = f"engine.dtype={dtype}"
    whole = trained(FULL, precise)
    there = cut_after_five(whole, tmp_path / "there")
    told = run(gloo_pool, world_size, corpus, there, MOBA, extra, precise)
    assert "note: the checkpoint was trained with other layers: the layers were full*2, are moba*2" in told
    near(losses(there), losses(whole), tolerance)
    longer = "train.steps=12"
    shutil.copytree(whole, tmp_path / "straight")
    run(gloo_pool, 2, corpus, tmp_path / "straight", FULL, precise, longer)
    told = run(gloo_pool, 2, corpus, there, FULL, precise, longer)
    assert "the layers were moba*2, are full*2" in told
    near(losses(there), losses(tmp_path / "straight"), tolerance)


def test_full_then_nsa_begins_with_new_gates_and_no_moments(gloo_pool, trained, corpus, tmp_path):
    whole = trained(FULL, EXACT)
    resumed = cut_after_five(whole, tmp_path / "resumed")
    # A rate at which nothing moves: weights after ten steps are those that were taken up after five.
    still = "optim.lr=1e-30 optim.warmup_steps=0"
    told = run(gloo_pool, 1, corpus, resumed, NSA, still, EXACT)
    assert "the layers were full*2, are full + nsa" in told
    assert (
        "note: begin with initial values, which the checkpoint does not have: attention.sparse.branch_gates.weight "
        "(block 1)" in told
    )
    found = tensors(resumed)
    config = ModelConfig(vocab_size=257, dim=32, num_layers=2, init_std=0.06)
    initial = initial_weight(GATES, torch.Size((12, 32)), config=config, seed=1234)
    assert torch.equal(found[f"/model/{GATES}"], initial.double())
    assert losses(resumed)[:5] == losses(whole)[:5] and losses(resumed)[5] != losses(whole)[5]
    # Moments as if they had been 0 before: after one step, exp_avg would be (1 - beta1) of the gradient.
    steps = {name: value.item() for name, value in found.items() if name.endswith("/step")}
    assert steps.pop(f"/optimizer/state/{GATES}/step") == 5 and set(steps.values()) == {10}
    for ours in ("exp_avg", "exp_avg_sq"):
        assert found[f"/optimizer/state/{GATES}/{ours}"].abs().max() > 0


@pytest.mark.slow
@pytest.mark.parametrize("layers", [NSA, f"attention=zigzag {stack('sla', 'landmark')}", SEER, STACKS["routing"]])
def test_new_parameters_are_the_same_on_every_mesh(gloo_pool, trained, corpus, tmp_path, layers):
    whole = trained(FULL, EXACT)
    found = []
    meshes = [(1, ""), (2, ""), (4, "parallel.cp=2 engine.parameters=shard"), (4, "engine.parameters=shard")]
    for number, (world_size, extra) in enumerate(meshes):
        resumed = cut_after_five(whole, tmp_path / f"resumed{number}")
        run(gloo_pool, world_size, corpus, resumed, layers, "attention=zigzag", EXACT, extra)
        found.append(losses(resumed))
        near(found[-1], found[0], 1e-10)


def test_seer_is_distilled_then_sparse_then_distilled(gloo_pool, trained, corpus, tmp_path):
    whole = trained(SEER, EXACT)
    sparse = cut_after_five(whole, tmp_path / "sparse")
    told = run(gloo_pool, 2, corpus, sparse, SPARSE_SEER, "engine.parameters=shard", EXACT)
    assert "trained with other layers: mixers.seer.mode was distill, is sparse" in told
    assert "begin with" not in told and "no layer uses" not in told
    near(losses(sparse), losses(whole), 1e-10)  # all blocks are within topk
    gate = "blocks.0.attention.sparse.gate_q"
    before, after = tensors(whole), tensors(sparse)
    assert f"/optimizer/state/{gate}/step" in before and f"/optimizer/state/{gate}/step" not in after
    assert not torch.equal(after[f"/model/{gate}"], before[f"/model/{gate}"])  # that of step 5: it learns no more
    told = run(gloo_pool, 2, corpus, sparse, SEER, EXACT, "train.steps=12")
    assert (
        "note: begin with a new state of the optimizer, as they were not trained: attention.sparse.gate_k "
        "(blocks 0-1), attention.sparse.gate_q (blocks 0-1)" in told
    )
    assert len(losses(sparse)) == 12


def test_a_selection_of_another_size_begins_anew_and_a_former_one_is_left(gloo_pool, trained, corpus, tmp_path):
    whole = trained(SEER, EXACT)
    wider = cut_after_five(whole, tmp_path / "wider")
    told = run(gloo_pool, 2, corpus, wider, SEER, "mixers.seer.gate_dim=16", EXACT)
    assert "mixers.seer.gate_dim was None, is 16" in told
    assert "begin with initial values, which the checkpoint does not have: attention.sparse.gate_k (blocks 0-1)" in told
    near(losses(wider), losses(whole), 1e-10)  # the gate's loss reaches nothing else
    plain = cut_after_five(whole, tmp_path / "plain")
    told = run(gloo_pool, 2, corpus, plain, FULL, EXACT, "optim.clip_grad_norm=0")
    unused = "attention.sparse.gate_k (blocks 0-1), attention.sparse.gate_q (blocks 0-1)"
    assert f"note: of the checkpoint, no layer uses: {unused}" in told
    near(losses(plain), losses(whole), 1e-10)


def test_a_checkpoint_from_before_kinds_were_saved(gloo_pool, trained, corpus, tmp_path):
    whole = trained(FULL, EXACT)
    resumed = cut_after_five(whole, tmp_path / "resumed")
    path = resumed / "checkpoints" / "iter_0000005" / "extra.json"
    extra = json.loads(path.read_text())
    assert extra.pop("kinds") == ["full", "full"] and extra.pop("layers") == {"attention.layers": None}
    extra["config"]["attention"]["layers"] = None
    path.write_text(json.dumps(extra))
    told = run(gloo_pool, 1, corpus, resumed, MOBA, EXACT)
    assert "the layers were full*2, are moba*2" in told
    near(losses(resumed), losses(whole), 1e-10)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            f"{MOBA} mixers.moba.rope=false",
            "layer 0 has mixers.full.rope=true in the checkpoint, mixers.moba.rope=false in the config",
        ),
        pytest.param(
            "attention=zigzag attention.layers=[moba,gdn] model.num_layers=2",
            "attention.layers is None in the checkpoint, 'moba + gdn' in the config",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_other_layers_are_refused_with_the_keys_named(gloo_pool, trained, corpus, tmp_path, overrides, message):
    again = cut_after_five(trained(FULL, EXACT), tmp_path / "again")
    with pytest.raises(RankError) as error:
        run(gloo_pool, 1, corpus, again, overrides, EXACT)
    assert message in str(error.value) and "ValueError" in str(error.value)
