"""`longctx verify` of linear layers and hybrid stacks: what is right passes, planted bugs fail on their lines."""

import pytest

import longctx.parallel.halo as halo
import longctx.parallel.relayout as relayout
from longctx.verification.report import WIDTH
from longctx.verification.small import small_kinds
from tests.longctx.test_verify import verify_on_a_rank
from tests.support import linear_bugs as bugs
from tests.support.verify import failed, results, table


@pytest.fixture(autouse=True)
def fresh_routes():
    """Routes are cached, those of planted bugs too."""
    yield
    for module in (halo, relayout):
        module._routes.cache_clear()


GOOD = [
    "attention=lightning",
    "attention=transnormer attention.state_passing=ring engine.dtype=bfloat16",
    "attention=gla attention.state_passing=pipelined attention.layout=zigzag",
    "attention=kda attention.state_passing=log_depth",
    "attention=striped attention.layers=deltanet+full",
    "attention=striped attention.layers=gdn+full attention.width=64 attention.state_layout=same",
    "attention=zigzag attention.layers=[retention,simple_gla,window,full] attention.window=6 model.num_layers=4",
    "attention=ring attention.layers=linear+full*2 attention.documents=false mixers.linear.feature_map=performer",
    "attention=auto attention.layers=regla+full engine.dtype=float64",
    "attention=local attention.layers=gdn+full parallel.cp=1",
]


@pytest.mark.parametrize("overrides", GOOD)
def test_what_is_right_passes(capsys, overrides):
    status, found, text = table(capsys, *overrides.split())
    assert status == 0, text
    assert set(found.values()) <= {"pass", "info"} and len(found) >= 24
    assert max(map(len, text.splitlines())) <= WIDTH
    kinds = [line.split()[3] for line in text.splitlines() if line.startswith("layers of kind ")]
    assert kinds and all(kind in text.partition("check  ")[0] for kind in kinds)


def test_every_kind_is_there_with_its_kernel(capsys):
    _, found, text = table(capsys, "attention=striped", "attention.layers=lightning*7+full")
    assert "layers  lightning*2 + full (configured: lightning*7 + full)" in text
    title = "longctx verify: striped(width 1) x ring x (causal, documents); linear layers: contiguous x all_gather"
    assert title in " ".join(text.split())
    rows = {line[:33].strip(): line.split()[-2] for line in text.splitlines() if line.startswith("layers of kind")}
    assert rows == {"layers of kind lightning": "torch", "layers of kind full": "torch:CpuFlash"}
    for name in ("lightning: states, textbook", "relayout to striped: tokens", "layout contiguous: round trip"):
        assert found[name] == "pass"


# Planted bugs, with which configuration each shows, lines that must fail, and lines that must not.
HYBRID = "attention=striped attention.layers=gdn+full"
BUGS = [
    (
        bugs.let_a_wrong_state_enter,
        HYBRID,
        {"gdn: out vs recurrence", "gdn: dv vs recurrence", "decoder: loss vs one rank", "decoder: worst gradient"},
        {"gdn: states sent forward", "gdn: convolution, out", "float64: out vs dense"},
    ),
    (
        bugs.go_on_across_documents,
        HYBRID,
        {"gdn: out vs recurrence", "gdn: leak probes forward", "gdn: leak probes backward", "decoder: leak probes"},
        {"gdn: states sent forward", "gdn: states sent backward", "gdn: convolution, out", "mask: pairs as configured"},
    ),
    (
        bugs.convolve_across_documents,
        HYBRID,
        {"gdn: convolution, out", "gdn: convolution, dx", "gdn: convolution, probes", "decoder: leak probes"},
        {"gdn: out vs recurrence", "gdn: halo sent forward"},
    ),
    (
        bugs.send_no_gradients_of_states,
        "attention=lightning",
        {
            "lightning: dk vs recurrence",
            "lightning: dv vs recurrence",
            "lightning: leak probes backward",
            "lightning: states sent backward",
            "decoder: worst gradient",
        },
        {"lightning: out vs recurrence", "lightning: dq vs recurrence", "decoder: loss vs one rank"},
    ),
    (
        bugs.lose_gradients_of_transitions,
        "attention=gla",
        {"gla: dg vs recurrence", "decoder: worst gradient"},
        {"gla: out vs recurrence", "gla: dv vs recurrence", "gla: states sent backward", "decoder: loss vs one rank"},
    ),
    (
        bugs.lose_a_halo,
        HYBRID,
        {"gdn: convolution, out", "gdn: convolution, dx", "decoder: loss vs one rank"},
        {"gdn: out vs recurrence", "gdn: halo sent forward"},
    ),
    (
        bugs.keep_states_in_bfloat16,
        "attention=gla",
        {"gla: out, float32"},
        {"gla: out vs recurrence", "gla: two runs, bit by bit"},
    ),
    (
        bugs.exchange_two_tokens,
        HYBRID,
        {"relayout to striped: tokens", "decoder: loss vs one rank"},
        {"gdn: out vs recurrence", "relayout to striped: forward"},
    ),
    (bugs.send_a_halo_twice, HYBRID, {"gdn: halo sent forward"}, {"gdn: convolution, out", "gdn: halo sent backward"}),
    (
        bugs.send_states_to_all,
        HYBRID,
        {"gdn: states sent forward", "gdn: states, textbook"},
        {"gdn: out vs recurrence", "gdn: dk vs recurrence"},
    ),
]


@pytest.mark.parametrize(("plant", "overrides", "must_fail", "must_pass"), BUGS, ids=[bug[0].__name__ for bug in BUGS])
def test_a_planted_bug_fails_on_its_line(capsys, monkeypatch, plant, overrides, must_fail, must_pass):
    for module in (halo, relayout):
        module._routes.cache_clear()
    plant(monkeypatch)
    status, found, text = table(capsys, *overrides.split())
    assert status == 1
    assert must_fail <= failed(found), text
    assert all(found[name] == "pass" for name in must_pass), text
    assert text.count("-> ") >= len(failed(found))
    assert max(map(len, text.splitlines())) <= WIDTH


def test_the_explanation_names_the_ranks(capsys, monkeypatch):
    bugs.send_no_gradients_of_states(monkeypatch)
    text = " ".join(table(capsys, "attention=lightning", "attention.documents=false")[2].split())
    assert "60 of 90 positions are off, of cp ranks [0, 1]; first position 0 (document" in text


def test_real_ranks_pass(gloo_pool):
    overrides = ["attention=striped", "attention.layers=gdn+full", "engine.parameters=shard", "engine.dtype=bfloat16"]
    (status, text), other = gloo_pool.run(verify_on_a_rank, 2, overrides)
    assert status == 0 and other == (0, ""), text
    found = results(text)
    assert {"engine step: gradient norm", "gdn: dk vs recurrence", "relayout to striped: tokens"} <= found.keys()


@pytest.mark.parametrize(
    ("given", "small"),
    [
        (["full"] * 9, "full full"),
        (["lightning"] * 7 + ["full"], "lightning lightning full"),
        ((["gdn"] * 3 + ["full"]) * 4, "gdn gdn full gdn"),
        (["linear", "gla", "full", "gla", "full"], "linear gla full gla"),
        (["full"], "full"),
    ],
)
def test_small_stacks_have_every_kind_and_change(given, small):
    assert small_kinds(given) == tuple(small.split())
