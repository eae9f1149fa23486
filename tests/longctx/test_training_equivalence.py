"""The same seed and data give the same losses, whatever the strategy and however many ranks share the work."""

import pytest

from tests.support.training import held_out_losses, losses, run_training, write_corpus

# Every layout, replicas and shards, cp 1, 2 and 4; the others, and the other schedules, are slow.
RUNS = [
    (1, "ring", "parallel.cp=1"),
    (4, "ring", "engine.parameters=shard parallel.cp=2"),
    (2, "zigzag", "parallel.cp=2"),
    (2, "local", "train.micro_batch=2"),
    (2, "striped", "model.tie_embeddings=true"),
    (2, "burst", ""),
    (4, "all_gather", "attention.gather_heads=1"),
    (2, "auto", ""),
]
MORE_RUNS = [
    (4, "usp", "attention.ulysses=2 attention.layout=zigzag"),
    (4, "double_ring", "attention.inner=2"),
    (2, "striped", "attention.width=5"),
    (4, "striped", "parallel.cp=2"),
    (2, "striped", "parallel.cp=2"),
    (4, "striped", "parallel.cp=4"),
    (2, "ring", "parallel.cp=2"),
    (4, "ring", "parallel.cp=4"),
    (4, "zigzag", "parallel.cp=4"),
    (1, "local", "parallel.cp=1"),
    (4, "local", "parallel.cp=1"),
    (2, "striped", "engine.parameters=shard"),
    (4, "zigzag", "engine.parameters=shard parallel.cp=2 parallel.dp_shard=2"),
    (4, "ulysses", "engine.parameters=shard"),
    (4, "usp", "attention.ulysses=2 attention.innermost=ring"),
]
IN_FLOAT32 = [run for run in RUNS + MORE_RUNS if run[1] in ("striped", "ring", "zigzag", "local")]
MASKS = {
    "window_sinks": "attention.window=20 attention.sinks=2",
    "head_windows": "attention.head_windows=[7,null,30,null]",
    "chunk": "attention.chunk=16",
    "prefix": "attention.prefix=9",
    "gpt_oss": "attention.window=20 model.sink_logits=true",
    "softcap": "model.softcap=2.0 model.qk_norm=head",
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "text")


@pytest.fixture(scope="module")
def reference(gloo_pool, corpus, tmp_path_factory):
    """Return the losses of one rank with striped attention, per dtype and tying."""
    done = {}

    def get(dtype: str, tied: bool):
        if (dtype, tied) not in done:
            run_dir = tmp_path_factory.mktemp("reference")
            done[dtype, tied] = run(gloo_pool, 1, "striped", f"model.tie_embeddings={tied}", dtype, corpus, run_dir)
        return done[dtype, tied]

    return get


def run(pool, world_size, attention, extra, dtype, corpus, run_dir):
    overrides = [f"attention={attention}", f"engine.dtype={dtype}", *extra.lower().split()]
    paths = [f"data.path={corpus}", f"data.cache_dir={corpus.parent / 'cache'}", f"run_dir={run_dir}"]
    pool.run(run_training, world_size, [*overrides, *paths])
    return losses(run_dir) + held_out_losses(run_dir)


@pytest.mark.parametrize(
    ("world_size", "attention", "extra", "dtype", "tolerance"),
    [(*run, "float64", 1e-10) for run in RUNS]
    + [pytest.param(*run, "float64", 1e-10, marks=pytest.mark.slow) for run in MORE_RUNS]
    + [pytest.param(*run, "float32", 1e-4, marks=pytest.mark.slow) for run in IN_FLOAT32],
    ids=lambda value: str(value),
)
def test_same_losses(gloo_pool, reference, corpus, tmp_path, world_size, attention, extra, dtype, tolerance):
    want = reference(dtype, "tie_embeddings=true" in extra)
    got = run(gloo_pool, world_size, attention, extra, dtype, corpus, tmp_path / "run")
    assert len(got) == len(want) == 21  # twenty steps and one evaluation
    assert 5.2 < want[0] < 6.2 and want[19] < want[0] - 0.5  # it starts near log(257) and learns
    for ours, theirs in zip(got, want, strict=True):
        assert abs(ours - theirs) <= tolerance * abs(theirs)


@pytest.mark.slow
@pytest.mark.parametrize("mask", MASKS)
def test_same_losses_under_every_mask(gloo_pool, reference, corpus, tmp_path, mask):
    """Each mask gives its own losses, and the same ones on one rank and on two."""
    want = run(gloo_pool, 1, "local", MASKS[mask], "float64", corpus, tmp_path / "one")
    got = run(gloo_pool, 2, "striped", MASKS[mask], "float64", corpus, tmp_path / "two")
    for ours, theirs, plain in zip(got, want, reference("float64", False), strict=True):
        assert abs(ours - theirs) <= 1e-10 * abs(theirs)
        assert abs(ours - plain) > 1e-6


def test_bfloat16_follows_float32(gloo_pool, reference, corpus, tmp_path):
    got = run(gloo_pool, 2, "striped", "engine.parameters=shard", "bfloat16", corpus, tmp_path / "run")
    for ours, theirs in zip(got, reference("float32", False), strict=True):
        assert 0 < abs(ours - theirs) < 0.02 * theirs  # it is another arithmetic, and close
