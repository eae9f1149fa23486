"""Stacks with linear layers give the same losses however many ranks share the work, in every layout; they resume."""

import json

import pytest

from tests.longctx.test_resume import cut_after_five, tensors
from tests.support.distributed import RankError
from tests.support.training import held_out_losses, losses, run_training, write_corpus

HYBRID = "attention.layers=[gdn,full,lightning] model.num_layers=3"
STACKS = {
    "lightning": "attention.layers=lightning",
    "gla": "attention.layers=gla",
    "gdn": "attention.layers=gdn",
    "hybrid": HYBRID,
    "performer": "attention.layers=linear mixers.linear.feature_map=performer mixers.linear.redraw_every=7",
}
RUNS = [
    ("hybrid", 2, "attention=striped"),
    ("performer", 2, "attention=zigzag"),
    ("gdn", 2, "attention=ring attention.state_passing=ring"),
    *((stack, 2, "attention=zigzag") for stack in ("lightning", "gla", "gdn")),
    *((stack, 4, "attention=ring") for stack in ("lightning", "gla", "gdn", "hybrid")),
    *((stack, 2, "attention=striped attention.width=16 attention.state_layout=same") for stack in STACKS),
    ("hybrid", 4, "attention=zigzag engine.parameters=shard"),
    ("hybrid", 4, "attention=striped attention.state_layout=zigzag"),
    ("hybrid", 4, "attention=striped parallel.cp=2"),
    ("hybrid", 2, "attention=local"),
    ("hybrid", 2, "attention=ulysses train.micro_batch=2"),
    *(("hybrid", 4, f"attention=zigzag attention.state_passing={name}") for name in ("ring", "log_depth", "pipelined")),
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "text")


def run(pool, world_size, corpus, run_dir, *overrides):
    paths = [f"data.path={corpus}", f"data.cache_dir={corpus.parent / 'cache'}", f"run_dir={run_dir}"]
    given = [each for override in overrides for each in override.split()]
    pool.run(run_training, world_size, [*paths, *given])
    return losses(run_dir) + held_out_losses(run_dir)


@pytest.fixture(scope="module")
def reference(gloo_pool, corpus, tmp_path_factory):
    """Return the losses of one rank, per stack and dtype."""
    done = {}

    def get(stack: str, dtype: str):
        if (stack, dtype) not in done:
            folder = tmp_path_factory.mktemp("reference")
            done[stack, dtype] = run(
                gloo_pool, 1, corpus, folder, STACKS[stack], "attention=ring", f"engine.dtype={dtype}"
            )
        return done[stack, dtype]

    return get


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stack", "world_size", "extra", "dtype", "tolerance"),
    [(*each, "float64", 1e-9) for each in RUNS] + [(*each, "float32", 1e-4) for each in RUNS[::3]],
    ids=str,
)
def test_same_losses(gloo_pool, reference, corpus, tmp_path, stack, world_size, extra, dtype, tolerance):
    want = reference(stack, dtype)
    got = run(gloo_pool, world_size, corpus, tmp_path / "run", extra, STACKS[stack], f"engine.dtype={dtype}")
    assert len(got) == len(want) == 21  # twenty steps and one evaluation
    assert 5.2 < want[0] < 6.2 and want[19] < want[0] - 0.5  # it starts near log(257) and learns
    for ours, theirs in zip(got, want, strict=True):
        assert abs(ours - theirs) <= tolerance * abs(theirs)


STEPS = "train.steps=10 checkpoint.every=5 checkpoint.keep_last=3"


@pytest.fixture(scope="module")
def undisturbed(gloo_pool, corpus, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "undisturbed"
    run(gloo_pool, 2, corpus, run_dir, STEPS, HYBRID)
    return run_dir


def test_five_and_five_steps_are_ten_bitwise(gloo_pool, undisturbed, corpus, tmp_path):
    resumed = cut_after_five(undisturbed, tmp_path / "resumed")
    run(gloo_pool, 2, corpus, resumed, STEPS, HYBRID)
    assert losses(resumed) == losses(undisturbed) and len(losses(undisturbed)) == 10
    ours, theirs = tensors(resumed), tensors(undisturbed)
    assert ours.keys() == theirs.keys() and any("A_log" in name for name in ours)
    for name, value in theirs.items():
        assert (ours[name] == value).all() if hasattr(value, "all") else ours[name] == value, name


@pytest.mark.parametrize(
    ("world_size", "extra"),
    [
        (1, "attention=local"),
        pytest.param(4, "attention=zigzag attention.state_passing=pipelined", marks=pytest.mark.slow),
        pytest.param(4, "engine.parameters=shard parallel.cp=2 mixers.gdn.kernel=reference", marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_continues_on_another_mesh_layout_and_state_passing(
    gloo_pool, undisturbed, corpus, tmp_path, world_size, extra
):
    resumed = cut_after_five(undisturbed, tmp_path / "resumed")
    run(gloo_pool, world_size, corpus, resumed, STEPS, extra, HYBRID)
    for ours, theirs in zip(losses(resumed), losses(undisturbed), strict=True):
        assert abs(ours - theirs) <= 1e-5 * theirs


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            "attention.layers=[gdn,full,gdn] model.num_layers=3",
            "attention.layers is 'gdn + full + lightning' in the checkpoint, 'gdn + full + gdn' in the config",
        ),
        pytest.param(
            f"{HYBRID} mixers.gdn.conv=3",
            "mixers.gdn.conv is 4 in the checkpoint, 3 in the config",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "model.num_layers=3",
            "attention.layers is 'gdn + full + lightning' in the checkpoint, None in the config",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_other_layers_are_refused_with_the_keys_named(gloo_pool, undisturbed, corpus, tmp_path, overrides, message):
    again = cut_after_five(undisturbed, tmp_path / "again")
    with pytest.raises(RankError) as error:
        run(gloo_pool, 2, corpus, again, STEPS, overrides)
    assert message in str(error.value) and "ValueError" in str(error.value)


def test_a_checkpoint_from_before_there_were_layers_continues(gloo_pool, corpus, tmp_path):
    first = tmp_path / "first"
    run(gloo_pool, 1, corpus, first, STEPS)
    resumed = cut_after_five(first, tmp_path / "resumed")
    path = resumed / "checkpoints" / "iter_0000005" / "extra.json"
    extra = json.loads(path.read_text())
    assert extra.pop("layers") == {"attention.layers": None}
    del extra["config"]["mixers"]
    path.write_text(json.dumps(extra))
    run(gloo_pool, 1, corpus, resumed, STEPS)
    assert losses(resumed) == losses(first)
