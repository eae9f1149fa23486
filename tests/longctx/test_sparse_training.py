"""Stacks with sparse layers give the same losses however many ranks share the work, in every layout and schedule."""

import pytest

from tests.support.training import held_out_losses, losses, run_training, write_corpus

SHORT = "data.seq_len=128 train.steps=10 train.global_batch=2 optim.warmup_steps=1"
# Blocks of 8 tokens, 16 of them; of NSA 16 tokens.
SETTINGS = {
    "moba": "block_size=8 topk=3",
    "nsa": "block_size=16 compress_size=8 compress_stride=4 select=4 local=1 window=20",
    "seer": "block_size=8 topk=3",
    "landmark": "block_size=8 topk=3",
    "mosa": "chunk=16 sparsity=4 block_size=8",
    "routing": "clusters=4 window=16 block_size=8",
    "sla": "block_size=8 topk=3",
    "sparse_strided": "stride=12",
    "sparse_fixed": "stride=16 columns=3 heads=alternate",
    "s2": "block_size=8 local=2 stride=2",
    "neighborhood": "window=24 stride=4 dilation=2",
    "vertical_slash": "vertical=[0,3] slash=[9] window=7",
}


def stack(*kinds: str) -> str:
    """Return the overrides for a model of these layers."""
    settings = [f"mixers.{kind}.{each}" for kind in sorted({*kinds} & {*SETTINGS}) for each in SETTINGS[kind].split()]
    return " ".join([f"attention.layers=[{','.join(kinds)}]", f"model.num_layers={len(kinds)}", *settings])


STACKS = {
    "moba": stack("moba", "moba", "moba", "full"),
    "nsa": stack("nsa", "lightning"),
    "distill": stack("seer", "seer"),
    "seer": f"{stack('seer', 'full')} mixers.seer.mode=sparse mixers.seer.threshold=0.01",
    # MoSA first: where a token sees nothing but tokens of its own letter, all of them come out alike, and in a layer
    # behind that score alike but for rounding, which is another in matmuls of other shapes.
    "routing": stack("mosa", "routing"),
    "sla": stack("sla", "landmark"),
    "static": stack("sparse_strided", "s2", "neighborhood"),
    "heads": stack("sparse_fixed", "vertical_slash"),
    "many": stack("moba", "nsa", "lightning", "seer", "sla", "full"),
    "more": stack("mosa", "routing", "landmark", "sparse_strided", "s2", "neighborhood", "sparse_fixed"),
    "window": f"{stack('window', 'moba', 'gdn')} attention.window=20",
    "sinks": f"{stack('moba', 'routing')} model.sink_logits=true model.softcap=3.0 model.qk_norm=head",
}
MANY_RUNS = [
    ("many", 4, "attention=zigzag"),
    ("more", 4, "attention=striped attention.width=8 attention.schedule=all_gather attention.kv_moves=blocks"),
]
RUNS = [
    ("moba", 2, "attention=ring attention.kv_moves=hops engine.parameters=shard"),
    ("seer", 4, "attention=ulysses parallel.cp=2"),
]
MESHES = [
    (4, "attention=ring"),
    (4, "attention=ulysses"),
    (2, "attention=all_gather attention.layout=zigzag attention.kv_moves=all"),
    (4, "attention=zigzag attention.kv_moves=blocks"),
    (2, "attention=striped attention.width=16 attention.kv_moves=blocks"),
    (4, "attention=striped attention.width=16 attention.schedule=all_gather attention.gather_heads=2"),
    (4, "attention=zigzag parallel.cp=2 engine.parameters=shard"),
    (4, "attention=usp attention.ulysses=2 attention.layout=zigzag"),
    (2, "attention=zigzag train.micro_batch=2"),
    (4, "attention=double_ring attention.layout=zigzag attention.inner=2"),
    (2, "attention=local"),
]
# Every stack on a mesh, every mesh with a stack.
SLOW_RUNS = [
    *MANY_RUNS,
    *((name, *MESHES[index % len(MESHES)]) for index, name in enumerate(STACKS)),
    *((name, 4, "attention=striped attention.kv_moves=hops") for name in ("routing", "static", "heads")),
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "text")


def run(pool, world_size, corpus, run_dir, *overrides):
    paths = [f"data.path={corpus}", f"data.cache_dir={corpus.parent / 'cache'}", f"run_dir={run_dir}"]
    given = [each for override in (SHORT, *overrides) for each in override.split()]
    pool.run(run_training, world_size, [*paths, *given])
    return losses(run_dir) + held_out_losses(run_dir)


@pytest.fixture(scope="module")
def reference(gloo_pool, corpus, tmp_path_factory):
    """Return the losses of one rank, per stack and dtype."""
    done = {}

    def get(name: str, dtype: str):
        if (name, dtype) not in done:
            folder = tmp_path_factory.mktemp("reference")
            done[name, dtype] = run(
                gloo_pool, 1, corpus, folder, "attention=ring", STACKS[name], f"engine.dtype={dtype}"
            )
        return done[name, dtype]

    return get


@pytest.mark.parametrize(
    ("name", "world_size", "extra", "dtype", "tolerance"),
    [(*each, "float64", 1e-10) for each in RUNS]
    + [pytest.param(*each, "float64", 1e-10, marks=pytest.mark.slow) for each in SLOW_RUNS]
    + [pytest.param(*each, "float32", 1e-4, marks=pytest.mark.slow) for each in RUNS + SLOW_RUNS[::5]],
    ids=str,
)
def test_same_losses(gloo_pool, reference, corpus, tmp_path, name, world_size, extra, dtype, tolerance):
    want = reference(name, dtype)
    got = run(gloo_pool, world_size, corpus, tmp_path / "run", extra, STACKS[name], f"engine.dtype={dtype}")
    assert len(got) == len(want) == 11  # ten steps and one evaluation
    assert 5.2 < want[0] < 6.2 and want[9] < want[0] - 0.5  # it starts near log(257) and learns
    for ours, theirs in zip(got, want, strict=True):
        assert abs(ours - theirs) <= tolerance * abs(theirs)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["many", "more"])
def test_same_losses_without_documents(gloo_pool, reference, corpus, tmp_path, name):
    whole = "attention.documents=false"
    want = run(gloo_pool, 1, corpus, tmp_path / "one", "attention=ring", STACKS[name], whole, "engine.dtype=float64")
    got = run(gloo_pool, 4, corpus, tmp_path / "four", "attention=zigzag", STACKS[name], whole, "engine.dtype=float64")
    for ours, theirs, packed in zip(got, want, reference(name, "float64"), strict=True):
        assert abs(ours - theirs) <= 1e-10 * abs(theirs)
        assert abs(ours - packed) > 1e-6
