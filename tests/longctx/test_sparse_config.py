"""Sparse layers from the command line: what composes, and what every mistake is told: the key, and what is needed."""

import re
import shlex

import pytest

from longctx.config import load_config
from longctx.kernels.block_sparse import triton_kernel
from longctx.mixers.config import MixersConfig
from longctx.mixers.pattern import SPARSE_KINDS
from longctx.setup import check_kernel, check_sparse_kernel, check_world

SMALL = "data.seq_len=2048 mixers.moba.block_size=64"


def check(overrides: str) -> tuple[tuple[str, ...], str]:
    """Check a configuration as the trainer does before anything is built; return the layers and who has a kernel."""
    config = load_config(shlex.split(overrides))
    check_world(config, world_size=4, per_machine=4)
    return config.layers.kinds, " ".join(sorted(check_kernel(config, device_type="cpu")))


@pytest.mark.parametrize("kind", SPARSE_KINDS)
def test_every_kind_has_a_preset(kind):
    kinds, kernels = check(f"attention={kind} data.seq_len=8192")
    assert kinds == (kind,) * 2 and kind in kernels.split()


@pytest.mark.parametrize(
    ("overrides", "kinds", "kernels"),
    [
        ("attention.layers='moba*28 + full*4' model.num_layers=32", ("moba",) * 28 + ("full",) * 4, "moba softmax"),
        ("attention.layers='moba*3 + lightning*1'", ("moba",) * 3 + ("lightning",), "lightning moba"),
        ("attention.layers='moba + window' attention.window=64", ("moba", "window"), "moba softmax"),
        ("attention.layers=[nsa,moba,full]", ("nsa", "moba", "full"), "moba nsa softmax"),
        ("attention.layout=striped attention.width=64", ("moba",) * 2, "moba"),
        ("attention.layout=contiguous attention.schedule=all_gather attention.kv_moves=hops", ("moba",) * 2, "moba"),
        ("attention.layers=[moba,routing,full]", ("moba", "routing", "full"), "moba routing softmax"),
        ("attention.layers=[moba,seer] attention.kv_moves=blocks", ("moba", "seer"), "moba seer softmax"),
        ("attention.schedule=ulysses attention.kv_moves=all", ("moba",) * 2, "moba"),
        ("attention.schedule=all_gather attention.kv_moves=hops attention.gather_heads=2", ("moba",) * 2, "moba"),
    ],
)
def test_stacks(overrides, kinds, kernels):
    assert check(f"attention=moba {SMALL} {overrides}") == (kinds, kernels)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            "attention=moba data.seq_len=2048",
            "mixers.moba.block_size=512 at parallel.cp=4: zigzag cuts blocks of 512 tokens: use "
            "attention.layout=contiguous, or attention.layout=zigzag and data.seq_len a multiple of 4096 such as 4096, "
            "or attention.layout=striped with attention.width a multiple of 512, or another block_size",
        ),
        (
            f"attention=moba {SMALL} attention.layout=striped attention.width=32",
            "mixers.moba.block_size=64 at parallel.cp=4: striped(width 32) cuts blocks of 64 tokens: use ",
        ),
        ("attention=landmark attention.layout=striped", "mixers.landmark.block_size=64 at parallel.cp=4: striped"),
        ("attention=moba mixers.moba.topk=0", "mixers.moba.topk must be >= 1; given 0"),
        ("attention=moba mixers.moba.topk=null", "field of type 'int'; the key is mixers.moba.topk"),
        ("attention=moba attention.kv_moves=foo", "attention.kv_moves=foo is not known; known are auto, all, hops, "),
        (
            "attention.kv_moves=blocks",
            "attention.kv_moves=blocks has no effect: no layer of attention.layers=null is sparse; leave it auto",
        ),
        (
            "attention=seer attention.kv_moves=blocks",
            "attention.kv_moves=blocks has no effect with mixers.seer.mode=distill, whose attention is dense: leave it "
            "auto, or set mixers.seer.mode=sparse",
        ),
        ("attention.layers=[seer,full] attention.kv_moves=hops", "attention.kv_moves=hops has no effect with mixers."),
        (
            "attention=moba attention.schedule=ulysses attention.kv_moves=hops",
            "attention.kv_moves=hops has no effect with attention.schedule=ulysses, where every rank has all tokens of "
            "its heads and nothing that is selected travels: leave it auto, or use attention.schedule=ring|",
        ),
        ("attention=local attention.layers=mosa attention.kv_moves=blocks", "no effect with attention.schedule=local"),
        (
            "attention=moba attention.schedule=all_gather attention.gather_heads=1 attention.kv_moves=blocks",
            "attention.kv_moves=blocks collects selected blocks of all KV heads at once, so that "
            "attention.gather_heads=1 cannot be honoured: set attention.kv_moves=hops, or leave attention.gather_heads",
        ),
        ("attention=gdn_3_1 attention.kv_moves=hops", "no layer of attention.layers=gdn*3 + full*1 is sparse"),
        (
            "attention=moba attention.chunk=64",
            "attention.chunk=64 cannot be honoured by layers of kind moba, which see what they select of all before "
            "them: leave it null, or use layers of kind full, window",
        ),
        (
            "attention.layers='full + s2' attention.prefix=9",
            "attention.prefix=9 cannot be honoured by layers of kind s2",
        ),
        (
            "attention=moba attention.window=64",
            "attention.window is that of layers of kind window, of which attention.layers=moba names none: leave it "
            "null, or name some",
        ),
        ("attention=moba attention.head_windows=[1,2,3,4]", "attention.head_windows is that of layers of kind window"),
        ("attention=moba attention.sinks=4", "attention.sinks=4 keeps tokens visible outside a window; set "),
        (
            "attention=auto attention.layers=moba",
            "attention.layout=auto is predicted from masks, which do not say what layers of kind moba select: name a",
        ),
        ("attention=nsa attention.schedule=auto", "attention.schedule=auto is predicted from masks"),
        (
            "attention=moba mixers.nsa.window=9",
            "mixers.nsa.window=9 has no effect: attention.layers names no layer 'nsa'",
        ),
        ("attention=full mixers.moba.topk=4", "attention=full is not known; known are"),
        ("mixers.moba.topk=4", "mixers.moba.topk=4 has no effect: attention.layers names no layer 'moba'"),
        (
            "attention=nsa model.sink_logits=true",
            "model.sink_logits=true cannot be honoured by layers of kind nsa, which have more than one softmax: set it "
            "to false",
        ),
        ("attention=sla model.sink_logits=true", "cannot be honoured by layers of kind sla"),
        (
            "attention=moba attention.kernel=torch",
            "attention.kernel=torch has no effect: no layer of attention.layers=moba is attention under a mask; leave "
            "it auto; kernels of other layers are set by mixers.<kind>.kernel",
        ),
        ("attention=moba mixers.moba.kernel=flash", "mixers.moba.kernel=flash is not known; known are auto, torch, "),
        ("attention=moba attention.state_layout=zigzag", "no layer of attention.layers=moba is linear; leave it null"),
        (
            "attention=sparse_strided mixers.sparse_strided.heads=alternate model.num_kv_heads=1",
            "mixers.sparse_strided: heads=alternate gives every other KV head another pattern; given "
            "model.num_kv_heads=1: set heads=merged, or raise model.num_kv_heads",
        ),
        ("attention=moba mixers.moba.window=9", "unknown key 'mixers.moba.window'"),
        (f"attention=moba {SMALL} attention.layers='mobba*3 + full'", "'mobba' is no kind of layer; known are full, "),
        (
            f"attention=moba {SMALL} attention.layers='moba*28 + full*4' model.num_layers=16",
            "has 32 layers, of which model.num_layers=16 is no multiple: set model.num_layers to one such as 32",
        ),
    ],
)
def test_mistakes(overrides, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        check(overrides)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("moba.block_size=0", "mixers.moba.block_size must be >= 1; given 0"),
        (
            "nsa.select=2",
            "mixers.nsa.select=2 must be >= 3: the first block of a document and mixers.nsa.local=2 others",
        ),
        ("nsa.window=0", "mixers.nsa.window must be >= 1; given 0"),
        ("nsa.block_size=40", "mixers.nsa.block_size=40 must be a multiple of mixers.nsa.compress_stride=16"),
        ("nsa.compress_size=128", "mixers.nsa.compress_size=128 must be <= mixers.nsa.block_size=64"),
        ("seer.mode=train", "mixers.seer.mode=train is not known; known are distill, sparse"),
        ("seer.threshold=2.0", "mixers.seer.threshold must be > 0 and < 1"),
        ("seer.gate_dim=7", "mixers.seer.gate_dim=7 must be even for RoPE; or set mixers.seer.rope=false"),
        ("landmark.topk=-1", "mixers.landmark.topk must be >= 1; given -1"),
        ("mosa.selection=all", "mixers.mosa.selection=all is not known; known are chunk, expert"),
        ("mosa.sparsity=7", "mixers.mosa.chunk=256 must be a multiple of mixers.mosa.sparsity=7"),
        ("routing.commitment=0.0", "mixers.routing.commitment must be > 0 and finite"),
        ("routing.clusters=0", "mixers.routing.clusters must be >= 1; given 0"),
        ("sla.feature_map=relu", "mixers.sla.feature_map=relu is not known; known are softmax, elu1"),
        ("sparse_strided.heads=odd", "mixers.sparse_strided.heads=odd is not known; known are merged, alternate"),
        ("sparse_fixed.columns=500", "mixers.sparse_fixed.columns=500 are more tokens than a block has; lower it"),
        ("neighborhood.stride=2000", "mixers.neighborhood.stride=2000 is more than a window"),
        ("s2.local=0", "mixers.s2.local must be >= 1; given 0"),
        ("vertical_slash.vertical=[3,-1]", "mixers.vertical_slash.vertical must be offsets >= 0; given -1"),
        ("moba.gate=tanh", "mixers.moba.gate=tanh is not known; known are none, sigmoid"),
    ],
)
def test_settings(setting, words):
    kind, _, rest = setting.partition(".")
    key, _, text = rest.partition("=")
    value = text if text.isalpha() else float(text) if "." in text else [3, -1] if "[" in text else int(text)
    settings = type(getattr(MixersConfig(), kind))(**{key: value})
    with pytest.raises(ValueError, match=re.escape(words)):
        MixersConfig(**{kind: settings}).validate([kind], head_dim=8)


def test_heads_that_are_gathered_a_few_at_a_time_are_never_exchanged_in_blocks_by_choice():
    overrides = ["attention=moba", "attention.schedule=all_gather"]
    assert load_config(overrides).attention.moves == "auto"
    assert load_config([*overrides, "attention.gather_heads=1"]).attention.moves == "hops"
    assert load_config([*overrides, "attention.gather_heads=2", "attention.kv_moves=all"]).attention.moves == "all"


def test_all_kernels_of_a_kind_are_named(monkeypatch):
    """SLA's sum has a column more than heads have: where that is too wide, another kernel computes it."""
    monkeypatch.setattr(triton_kernel, "reason_not_to_run", lambda device_type: None)
    for size, names in ((64, "triton"), (256, "triton and torch"), (512, "torch")):
        config = load_config(["attention=sla", f"model.head_dim={size}"])
        assert check_sparse_kernel(config, "sla", device_type="cuda") == names


def test_settings_of_a_command_line_are_checked():
    with pytest.raises(ValueError, match="mixers.nsa.select=2 must be >= 3"):
        check("attention=nsa mixers.nsa.select=2")
