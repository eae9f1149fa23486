"""`longctx verify` of sparse layers: what is right passes, planted bugs fail on their lines."""

import re

import pytest
import torch

from longctx import verify
from longctx.config import load_config
from longctx.kernels.block_sparse.selection import allowed
from longctx.mixers.config import MixersConfig
from longctx.mixers.pattern import SPARSE_KINDS
from longctx.mixers.sparse.base import Slots, SparseMixerConfig, best_slots
from longctx.verification import truth_sparse
from longctx.verification.report import WIDTH, WIDTHS
from longctx.verification.small import shrink
from longctx.verification.sparse_bytes import slots_of
from longctx.verification.sparse_layer import make_mixer, run_whole, settings_of
from longctx.verification.truth_sparse import starts_of
from longctx.verification.watch_sparse import selections
from tests.longctx.test_verify import verify_on_a_rank
from tests.support import sparse_bugs as bugs
from tests.support.verify import failed, results

STATIC = ("sparse_strided", "sparse_fixed", "s2", "neighborhood", "vertical_slash")
ROUTED = tuple(kind for kind in SPARSE_KINDS if kind not in STATIC)


def table(capsys, *arguments: str, tokens: int = 16) -> tuple[int, dict[str, str], str]:
    """Return the exit status, the result of every check by its name, and all that was printed."""
    capsys.readouterr()
    status = verify.main(["--tokens", str(tokens), "parallel.cp=2", "data.seq_len=12288", *arguments])
    text = capsys.readouterr().out
    return status, results(text), text


def row(text: str, name: str) -> str:
    """Return what was measured on a line."""
    (line,) = (line for line in text.splitlines() if line[: WIDTHS[0]].strip() == name)
    return line[WIDTHS[0] + 1 : sum(WIDTHS[:2]) + 1].strip()


def check_good(status, found, text):
    assert status == 0, text
    assert set(found.values()) <= {"pass", "info"} and len(found) >= 18
    assert max(map(len, text.splitlines())) <= WIDTH


@pytest.mark.parametrize("kind", SPARSE_KINDS)
def test_every_kind_passes(capsys, kind):
    status, found, text = table(capsys, f"attention={kind}")
    check_good(status, found, text)
    assert f"longctx verify: sparse layers: zigzag x ring x K/V by auto x ({kind})" in text
    assert {f"{kind}: out vs one rank", f"{kind}: probes forward", "decoder: worst gradient"} <= found.keys()
    if kind != "seer":  # distilled: attention is dense
        assert {f"{kind}: set in float64", f"{kind}: set in float32"} <= found.keys()
        assert int(row(text, f"{kind}: pairs selected").partition("%")[0]) < 90
    assert (f"{kind}: pairs as set" in found) == (kind in STATIC)


MORE = [
    "attention=seer mixers.seer.mode=sparse mixers.seer.threshold=0.1 engine.dtype=bfloat16",
    "attention=landmark attention.schedule=ulysses model.sink_logits=true model.softcap=5 mixers.landmark.gate=sigmoid",
    "attention=zigzag attention.layers=[moba,gdn,full,sla] model.num_layers=4 attention.documents=false",
    "attention=moba model.num_kv_heads=4 attention.kv_moves=hops engine.dtype=float64 model.qk_norm=head",
    "attention=nsa parallel.cp=1 attention.layout=contiguous mixers.nsa.rope=false",
]


@pytest.mark.parametrize("overrides", MORE)
def test_what_is_right_passes(capsys, overrides):
    check_good(*table(capsys, *overrides.split()))


def test_expert_choice_is_not_causal_and_says_so(capsys):
    status, found, text = table(capsys, "attention=mosa", "mixers.mosa.selection=expert")
    check_good(status, found, text)
    assert text.count("0; documents only") == 3
    assert "mixers.mosa.selection=expert looks at later tokens: its leak probes look at documents only" in text


PRODUCTS = [
    (kind, where, ("blocks", "hops", "all")[(index + number) % 3], ("bfloat16", "float32")[(index + number) % 2])
    for index, kind in enumerate(SPARSE_KINDS)
    for number, where in enumerate(
        (
            "parallel.cp=3 attention.schedule=ring",
            "parallel.cp=4 attention.schedule=all_gather",
            "parallel.cp=2 attention.schedule=ulysses",
            "parallel.cp=4 attention.schedule=usp attention.ulysses=2",
        )
    )
]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "where", "moves", "dtype"), PRODUCTS)
def test_every_kind_passes_on_every_schedule(capsys, kind, where, moves, dtype):
    if kind == "seer" or "ulysses" in where.split("=")[-1]:  # distilled; all heads are shared
        moves = "all"
    overrides = f"attention={kind} {where} attention.kv_moves={moves} engine.dtype={dtype}"
    check_good(*table(capsys, *overrides.split(), tokens=48))


# Planted bugs, with which configuration each shows, lines that must fail, and lines that must not.
BUGS = [
    (
        bugs.drop_a_block,
        "attention=moba attention.kv_moves=blocks",
        {"moba: out vs one rank", "moba: dx vs one rank", "moba: sent forward", "decoder: loss vs one rank"},
        {"moba: set in float64", "moba: pairs possible", "moba: routing sent"},
    ),
    (
        bugs.lose_a_gradient_of_keys,
        "attention=routing attention.kv_moves=blocks",
        {"routing: dx vs one rank", "routing: dk, f32", "decoder: worst gradient"},
        {"routing: out vs one rank", "routing: dv, f32", "routing: sent backward", "decoder: loss vs one rank"},
    ),
    (
        bugs.keep_gradients_of_summaries,
        "attention=nsa",
        {"nsa: dx vs one rank", "nsa: dk, f32", "nsa: sent backward", "decoder: worst gradient"},
        {"nsa: out vs one rank", "nsa: set in float64", "nsa: sent forward", "decoder: loss vs one rank"},
    ),
    (
        bugs.keep_gradients_of_summaries,
        "attention=landmark",
        {"landmark: d landmark_weight", "landmark: sent backward"},
        {"landmark: out vs one rank", "landmark: set in float64"},
    ),
    (
        bugs.route_by_local_blocks,
        "attention=moba",
        {"moba: out vs one rank", "moba: set in float64", "moba: set in float32", "decoder: loss vs one rank"},
        {"moba: pairs possible", "moba: sent forward", "moba: out, f32", "moba: probes forward"},
    ),
    (
        bugs.round_summaries,
        "attention=sla",
        {"sla: set in float32"},
        {"sla: set in float64", "sla: out vs one rank", "decoder: loss vs one rank"},
    ),
    (
        bugs.send_wide_summaries,
        "attention=moba",
        {"moba: routing sent", "moba: sent forward"},
        {"moba: set in float32", "moba: K/V by hops", "moba: sent backward"},
    ),
    (
        bugs.see_the_future_of_the_own_block,
        "attention=moba",
        {"moba: pairs possible", "moba: probes forward", "moba: probes backward", "decoder: leak probes"},
        {"moba: out vs one rank", "moba: set in float64", "decoder: loss vs one rank"},
    ),
    (
        bugs.choose_by_the_whole_document,
        "attention=mosa",
        {"mosa: probes forward", "mosa: pairs possible", "decoder: leak probes"},
        {"mosa: out vs one rank", "mosa: set in float64", "decoder: loss vs one rank"},
    ),
    (
        bugs.ignore_documents,
        "attention=moba",
        {"moba: pairs possible", "moba: set in float64", "moba: probes forward", "decoder: leak probes"},
        {"moba: routing sent"},
    ),
    (
        bugs.lose_gradients_of_gates,
        "attention=landmark",
        {"landmark: d landmark_weight", "landmark: dx vs one rank", "decoder: worst gradient"},
        {"landmark: out vs one rank", "landmark: set in float64", "landmark: dv, f32", "decoder: loss vs one rank"},
    ),
    (
        bugs.average_losses,
        "attention=routing",
        {"routing: its own loss", "routing: d centroids", "decoder: losses of layers", "decoder: worst gradient"},
        {"routing: out vs one rank", "routing: dx vs one rank", "decoder: loss vs one rank"},
    ),
    (
        bugs.lose_losses,
        "attention=seer",
        {"seer: its own loss", "seer: d gate_q", "decoder: losses of layers", "decoder: worst gradient"},
        {"seer: out vs one rank", "seer: dx vs one rank", "decoder: loss vs one rank"},
    ),
    (
        bugs.widen_a_window,
        "attention=neighborhood",
        {"neighborhood: pairs as set", "neighborhood: probes forward", "decoder: leak probes"},
        {"neighborhood: out vs one rank", "neighborhood: set in float64"},
    ),
    (
        bugs.forget_half_the_costs,
        "attention=mosa attention.kv_moves=hops",
        {"mosa: K/V by hops"},
        {"mosa: out vs one rank", "mosa: sent forward", "mosa: sent backward"},
    ),
    (bugs.round_queries, "attention=s2", {"s2: out, f32"}, {"s2: out vs one rank", "s2: two runs, bits"}),
    (
        bugs.add_noise,
        "attention=vertical_slash",
        {"vertical_slash: two runs, bits"},
        {"vertical_slash: set in float32"},
    ),
]


@pytest.mark.parametrize(("plant", "overrides", "must_fail", "must_pass"), BUGS, ids=[bug[0].__name__ for bug in BUGS])
def test_a_planted_bug_fails_on_its_line(capsys, monkeypatch, plant, overrides, must_fail, must_pass):
    plant(monkeypatch)
    status, found, text = table(capsys, *overrides.split())
    assert status == 1
    assert must_fail <= failed(found), text
    assert all(found[name] == "pass" for name in must_pass), text
    assert text.count("-> ") >= len(failed(found))
    assert max(map(len, text.splitlines())) <= WIDTH


def test_the_explanation_names_the_ranks(capsys, monkeypatch):
    bugs.drop_a_block(monkeypatch)
    text = " ".join(table(capsys, "attention=moba", "attention.kv_moves=blocks")[2].split())
    assert re.search(r"positions are off, of cp ranks \[0, 1\]; first position \d+ \(document", text)


def test_real_ranks_pass(gloo_pool):
    overrides = ["attention=zigzag", "attention.layers=[nsa,routing,moba]", "model.num_layers=3", "data.seq_len=8192"]
    (status, text), other = gloo_pool.run(verify_on_real_ranks, 2, [*overrides, "engine.parameters=shard"])
    assert status == 0 and other == (0, ""), text
    assert {"engine step: gradient norm", "nsa: dx vs one rank", "decoder: losses of layers"} <= results(text).keys()


def verify_on_real_ranks(rank, world_size, group, overrides):
    return verify_on_a_rank(rank, world_size, group, overrides, tokens=16)


def test_tokens_that_cut_blocks_are_refused(capsys):
    assert verify.main(["attention=moba", "--tokens=15", "parallel.cp=2", "data.seq_len=8192"]) == 2
    told = capsys.readouterr().err
    assert "--tokens (per rank) must be a multiple of 8, so that attention.layout=zigzag keeps blocks" in told
    assert "given 15: use 8 or 16" in told


def test_blocks_that_the_configured_length_cuts_are_refused(capsys):
    assert verify.main(["attention=moba", "parallel.cp=4", "data.seq_len=6144"]) == 2
    assert "mixers.moba.block_size=512 at parallel.cp=4: zigzag cuts blocks of 512 tokens" in capsys.readouterr().err


@pytest.mark.parametrize("kind", SPARSE_KINDS)
@pytest.mark.parametrize(
    ("cp", "tokens", "seq_len"), [(2, 16, 4096), (4, None, 8192), (8, None, 1 << 20), (3, 24, 6144)]
)
def test_small_settings_are_valid_and_said(kind, cp, tokens, seq_len):
    config = load_config([f"attention={kind}", f"parallel.cp={cp}", f"data.seq_len={seq_len}"])
    small = shrink(config, cp=cp, per_machine=cp, tokens_per_rank=tokens)
    before, after = config.mixers.sparse_kind(kind), small.layers.mixers.sparse_kind(kind)
    after.validate(kind)
    changed = {key for key, value in vars(before).items() if getattr(after, key) != value}
    assert changed == {text.split()[0].rsplit(".", 1)[-1] for text in small.scaled} and changed
    if after.whole > 1:
        assert 4 <= after.whole <= 8 and small.total // cp % (2 * after.whole) == 0
    longest = small.total // 2
    pairs, causal = settings_of(small, kind).pairs(0, longest), longest * (longest + 1) // 2
    distilled = kind == "seer"
    assert distilled or pairs < {"nsa": 2.5, "sla": 1.8}.get(kind, 0.9) * causal  # of so many branches


def test_small_settings_keep_what_is_small_and_what_blocks_are_made_of():
    sizes = {"block_size": 8, "compress_size": 8, "compress_stride": 8, "select": 3, "local": 1, "window": 4}
    config = load_config(["attention=nsa", *(f"mixers.nsa.{key}={value}" for key, value in sizes.items())])
    small = shrink(config, cp=4, per_machine=4)
    assert small.layers.mixers.nsa == config.mixers.nsa and small.scaled == ()
    wide = load_config(["attention=moba", "attention.layout=striped", "attention.width=1024", "data.seq_len=16384"])
    small = shrink(wide, cp=4, per_machine=4)
    assert small.attention.width % small.layers.mixers.moba.block_size == 0
    assert "attention.width 1024 -> 16" in small.scaled


@pytest.mark.parametrize("kind", STATIC)
def test_patterns_in_other_words_are_those_of_the_kernels(kind):
    """What verify compares with must itself be right: two independent readings of the papers agree."""
    config = load_config([f"attention={kind}"])
    small = shrink(config, cp=2, per_machine=2, tokens_per_rank=33)
    settings, documents = settings_of(small, kind), torch.tensor([0] * 20 + [1] * 3 + [2] * 43)
    seen = truth_sparse.static_pairs(settings, documents, heads=4, kv_heads=2)
    pattern = settings.pattern.selection(
        positions=torch.arange(66), document_of=starts_of(documents)[None], num_heads=4, num_kv_heads=2
    )
    ours = allowed(pattern, torch.arange(66))[0]
    assert torch.equal(seen, ours.repeat_interleave(4 // len(ours), dim=0))


@pytest.mark.parametrize("kind", SPARSE_KINDS)
def test_settings_know_the_size_of_what_is_selected(kind):
    """What ranks that share heads tell each other is counted from it."""
    sparse = ["mixers.seer.mode=sparse"] if kind == "seer" else []
    small, notes = whole_layer(kind, *sparse)
    parts = [slots_of(part) for selection in selections(notes) for part in selection.parts()]
    assert tuple(parts) == settings_of(small, kind).slots(total=small.total, heads=4, kv_heads=2)


def test_there_are_no_more_slots_than_blocks():
    for size, topk, slots in ((8, 100, 9), (8, 8, 8), (64, 2, 2), (8, 1, 1)):
        assert best_slots(4, total=60, block_size=size, topk=topk) == Slots(4, slots, classes=False)


@pytest.mark.parametrize("kind", ["moba", "seer", "landmark", "sla"])
def test_nothing_is_told_where_only_the_own_block_is_seen(kind):
    sparse = ["mixers.seer.mode=sparse"] if kind == "seer" else []
    for topk in (1, 2):
        small, notes = whole_layer(kind, f"mixers.{kind}.topk={topk}", *sparse)
        asked = [note for note in notes if note.method.startswith("gather_")]
        settings = settings_of(small, kind)
        told = settings.summaries(tokens=small.total, kv_heads=2, head_dim=8, dtype=torch.float32)
        assert bool(asked) == bool(told.what) == bool(told.forward) == (topk == 2)


def whole_layer(kind, *overrides):
    """Return a small configuration, and what one rank's layer asked its place for."""
    small = shrink(load_config([f"attention={kind}", *overrides]), cp=1, per_machine=1, tokens_per_rank=64)
    return small, run_whole(small, make_mixer(small, kind, batch=1, seed=1), backward=False).notes[0]


def test_a_kind_must_say_what_it_tells():
    with pytest.raises(NotImplementedError):
        SparseMixerConfig().summaries(tokens=8, kv_heads=1, head_dim=8, dtype=torch.float32)


def test_every_kind_has_a_small_form():
    assert {kind for kind in vars(MixersConfig()) if kind in SPARSE_KINDS} == {*STATIC, *ROUTED}
