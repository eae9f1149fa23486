"""`longctx verify` passes what is right and fails what is wrong, on the line that says so: bugs are planted."""

import dataclasses
import io
import re

import pytest
import torch

from longctx import verify
from longctx.cli import VERIFY_HELP
from longctx.config import load_config
from longctx.kernels.positions import Tile
from longctx.parallel import needs as needs_module
from longctx.parallel import plan as plan_module
from longctx.parallel.schedules.ring import Ring
from longctx.setup import check_world
from longctx.verification.report import WIDTH, Finding, Table, everywhere
from tests.support import bugs
from tests.support.verify import failed, results, table

WINDOW = ("attention.window=6", "attention.sinks=2", "model.sink_logits=true")


@pytest.fixture(autouse=True)
def fresh_plans():
    """Plans are cached, those of planted bugs too."""
    caches = (plan_module.plan, needs_module._needs)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


GOOD = [
    "attention=striped",
    "attention=ring attention.window=6 attention.sinks=2 model.sink_logits=true",
    "attention=zigzag attention.prefix=5 model.tie_embeddings=true model.qk_norm=head",
    "attention=zigzag attention.backward=rotate_q engine.dtype=bfloat16",
    "attention=striped attention.width=4 attention.documents=false engine.dtype=float64",
    "attention.schedule=all_gather attention.chunk=64 attention.layout=contiguous model.softcap=5 model.num_heads=2",
    "attention.schedule=ulysses model.num_heads=6 model.num_kv_heads=2 model.head_dim=4",
    "attention.schedule=usp attention.ulysses=2 parallel.cp=4 attention.head_windows=[3,9,null,9]",
    "attention.schedule=double_ring attention.inner=2 parallel.cp=4 model.num_kv_heads=1",
    "attention=local parallel.cp=1",
    "attention=auto",
]


@pytest.mark.parametrize("overrides", GOOD)
def test_what_is_right_passes(capsys, overrides):
    status, found, text = table(capsys, *overrides.split())
    assert status == 0, text
    assert set(found.values()) <= {"pass", "info"} and len(found) >= 24
    assert max(map(len, text.splitlines())) <= WIDTH <= 100
    assert "\033" not in text
    assert f"all {len(found) - 1} checks passed" in text  # the balance is for information


# Planted bugs, with which configuration each shows, lines that must fail, and lines that must not.
BUGS = [
    (
        bugs.forget_windows,
        "attention=ring attention.window=6",
        {
            "float64: out vs dense",
            "float64: lse vs dense",
            "leak probes, float64: forward",
            "decoder: loss vs one rank",
        },
        {"plan: pairs computed once", "mask: pairs as configured", "layout: round trip"},
    ),
    (bugs.swap_positions, "attention=zigzag", {"layout: round trip"}, {"plan: pairs computed once"}),
    (
        bugs.lose_a_hop_of_dk,
        "attention.backward=rotate_kv",
        {"float64: dk vs dense", "float32: dk vs float64, rms", "decoder: worst gradient"},
        {"float64: out vs dense", "float64: dq vs dense", "float64: dv vs dense", "sent backward: as planned"},
    ),
    (
        bugs.lose_sink_gradients,
        "model.sink_logits=true",
        {"float64: d(sink logits) vs dense", "decoder: worst gradient"},
        {"float64: out vs dense", "float64: dk vs dense", "decoder: loss vs one rank"},
    ),
    (
        bugs.shift_labels_after_sharding,
        "attention=striped",
        {"labels: the next token", "decoder: loss vs one rank"},
        {"float64: out vs dense", "tokens", "positions for RoPE"},
    ),
    (
        bugs.number_positions_by_rank,
        "attention=ring",
        {"positions for RoPE", "decoder: loss vs one rank", "decoder: worst gradient"},
        {"float64: out vs dense", "labels: count over ranks"},
    ),
    (
        bugs.ignore_documents,
        "attention=striped",
        {"mask: pairs as configured", "plan: pairs computed once", "float64: out vs dense", "decoder: leak probes"},
        {"labels: the next token", "sent forward: as planned"},
    ),
    (
        bugs.make_an_extra_hop,
        "attention=striped",
        {"sent forward: as planned", "sent forward: textbook, no mask"},
        {"float64: out vs dense", "decoder: worst gradient", "sent backward: as planned"},
    ),
    (bugs.fetch_everything, "attention=ring attention.window=3", {"plan: shards fetched"}, {"float64: out vs dense"}),
    (
        bugs.lose_a_tile,
        "attention=zigzag",
        {"plan: pairs computed once", "float64: out vs dense"},
        {"layout: round trip"},
    ),
    (bugs.compute_a_tile_twice, "attention=zigzag", {"plan: pairs computed once", "float64: out vs dense"}, {"tokens"}),
    (
        bugs.see_one_key_ahead,
        "attention=ring",
        {"plan: pairs computed once", "leak probes, float64: forward", "leak probes, float64: backward"},
        {"mask: pairs as configured"},
    ),
    (bugs.round_angles, "data.seq_len=3145728", {"RoPE at position 3,145,727"}, {"positions for RoPE"}),
    (
        bugs.skip_the_last_round,
        "data.seq_len=3072",
        {"plan: pairs of 3,072 tokens"},
        {"plan: pairs computed once", "float64: out vs dense"},
    ),
    (bugs.round_queries, "attention=striped", {"float32: out vs float64, rms"}, {"float64: out vs dense"}),
    (bugs.add_noise, "attention=striped", {"two runs, bit by bit"}, {"float64: out vs dense"}),
    (
        bugs.raise_in_the_backward_pass,
        "attention=striped",
        {"attention in float64", "attention as configured", "decoder"},
        {"layout: round trip", "plan: pairs computed once", "decoder: leak probes"},
    ),
]


@pytest.mark.parametrize(("plant", "overrides", "must_fail", "must_pass"), BUGS, ids=[bug[0].__name__ for bug in BUGS])
def test_a_planted_bug_fails_on_its_line(capsys, monkeypatch, plant, overrides, must_fail, must_pass):
    plant(monkeypatch)
    status, found, text = table(capsys, *overrides.split())
    assert status == 1
    assert must_fail <= failed(found), text
    assert all(found[name] == "pass" for name in must_pass), text
    assert text.count("-> ") >= len(failed(found))  # each with its explanation
    assert max(map(len, text.splitlines())) <= WIDTH
    assert f"{len(failed(found))} FAILED" in text


def test_the_explanation_says_where(capsys, monkeypatch):
    bugs.lose_a_hop_of_dk(monkeypatch)
    text = " ".join(
        table(capsys, "attention.backward=rotate_kv", "attention=ring", "attention.documents=false")[2].split()
    )
    assert "15 of 45 positions are off, of cp ranks [1]; first position 15 (document" in text


def test_small_keeps_what_decides_and_scales_the_rest(capsys):
    overrides = ("attention.window=100", "attention.chunk=200", "attention.width=64", "engine.dtype=float64")
    _, _, text = table(capsys, *overrides, "model=llama3_8b")
    assert "32 heads of 8, 8 KV heads (configured: 32, 4096, heads of 128)" in text
    assert "scaled  attention.window 100 -> 5" in text and "attention.chunk 200 -> 11" in text
    assert "attention.width 64 -> 5" in text
    assert "15 per rank, 45 in all" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["attention.layot=ring"], "unknown key 'attention.layot'"),
        (
            ["attention.schedule=ulysses", "parallel.cp=3", "data.seq_len=768"],
            "parallel.cp=3 must divide model.num_heads",
        ),
        (["attention=local", "parallel.cp=2"], "attention.schedule=local keeps a sequence on one rank"),
        (["parallel.cp=3", "data.seq_len=1000"], "data.seq_len=1000 cannot be divided by parallel.cp=3"),
        (["--tokens", "few"], "--tokens needs a number of tokens per rank; given 'few'"),
        (["--tokens=3"], "--tokens (per rank) must be >= 9; given 3"),
    ],
)
def test_bad_configurations_are_refused_as_by_train(capsys, arguments, message):
    assert verify.main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.out == ""


def test_an_open_cp_takes_what_fits(capsys):
    assert verify.main(["--tokens=9", "data.seq_len=1026", "engine.dtype=float64"]) == 0
    assert "2 simulated in this process (parallel.cp is null)" in capsys.readouterr().out


def test_missing_messages_end_the_table(capsys, monkeypatch):
    monkeypatch.setattr("longctx.parallel.loopback.TIMEOUT_SECONDS", 0.4)
    right = Ring.forward

    def forward(self, ring, needs, k, v, *, attend):
        right(self, ring, needs, k, v, attend=attend)
        ring.exchange({}, {(ring.rank + 1) % ring.size: [torch.empty_like(k)]}).wait()

    monkeypatch.setattr(Ring, "forward", forward)
    status, found, text = table(capsys, "attention=striped")
    assert status == 1 and failed(found) == {"attention in float64"}
    assert "the other checks are not made" in text


def verify_on_a_rank(rank, world_size, group, overrides, bug=None, tokens=15):
    """Verify on a pooled rank; return status and text."""
    with pytest.MonkeyPatch.context() as patch:
        if bug is not None:
            getattr(bugs, bug)(patch)
        config = load_config(overrides)
        degrees = check_world(config, world_size=world_size, per_machine=world_size)
        out = io.StringIO()
        status = verify.verify_ranks(
            config, degrees=degrees, per_machine=world_size, device=torch.device("cpu"), tokens=tokens, out=out
        )
        return status, out.getvalue()


def test_real_ranks_pass(gloo_pool):
    overrides = ["attention=zigzag", *WINDOW, "engine.parameters=shard", "engine.dtype=bfloat16"]
    (status, text), other = gloo_pool.run(verify_on_a_rank, 2, overrides)
    assert status == 0 and other == (0, ""), text
    found = results(text)
    assert {"engine step: loss", "engine step: gradient norm", "engine step: labels"} <= found.keys()
    assert not failed(found)


def test_real_ranks_find_means_instead_of_sums(gloo_pool):
    (status, text), _ = gloo_pool.run(verify_on_a_rank, 2, ["attention=striped"], "average_over_ranks")
    assert status == 1 and failed(results(text)) == {"engine step: gradient norm"}


def test_a_failure_of_another_group_is_heard(gloo_pool):
    ranks = gloo_pool.run(verify_on_a_rank, 4, ["attention=striped", "parallel.cp=2"], "lose_values_on_the_last_rank")
    assert [status for status, _ in ranks] == [1] * 4
    found, text = results(ranks[0][1]), ranks[0][1]
    assert "float64: out vs dense" in failed(found) and "-> [rank 2]" in text  # rank 0's own group is sound


def test_ranks_are_joined_with_their_failures():
    good, bad = Finding(name="a", measured="1"), Finding(name="a", measured="2", passed=False, why="because")
    assert everywhere([[good], [good]]) == [good]
    assert everywhere([[good], [bad]]) == [dataclasses.replace(bad, why="[rank 1] because")]


def test_colour_is_for_terminals_only():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for stream, coloured in ((Terminal(), True), (io.StringIO(), False)):
        Table(stream).add(Finding(name="a", measured="1", passed=False))
        assert ("\033[1;31mFAIL\033[0m" in stream.getvalue()) == coloured


def test_tiles_of_the_plan_are_plain():
    """The coverage check reads these fields."""
    assert {"lo", "hi", "predicate"} <= {field.name for field in dataclasses.fields(Tile)}


@pytest.mark.parametrize("example", VERIFY_HELP.partition("examples:\n")[2].partition("\n\n")[0].strip().splitlines())
def test_examples_of_the_help_are_accepted(example):
    load_config(re.findall(r"(?<!\S)[a-z][\w.]*=\S+", example))
