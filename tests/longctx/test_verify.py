"""`longctx verify` passes what is right and fails what is wrong, on the line that says so: bugs are planted."""

import dataclasses
import io
import re
from dataclasses import replace

import pytest
import torch

import longctx.verification.check_data as check_data
import longctx.verification.check_model as check_model
from longctx import verify
from longctx.attention_config import AttentionConfig
from longctx.attention_function import Attention
from longctx.cli import VERIFY_HELP
from longctx.config import load_config
from longctx.kernels.positions import Tile
from longctx.kernels.softmax.torch_kernel import TorchKernel
from longctx.loss import IGNORED
from longctx.parallel import balance as balance_module
from longctx.parallel import needs as needs_module
from longctx.parallel import plan as plan_module
from longctx.parallel.layout import Layout
from longctx.parallel.schedules.ring import Ring
from longctx.setup import check_world
from longctx.verification.report import WIDTH, WIDTHS, Finding, Table, everywhere

SMALL = ("--tokens", "15", "parallel.cp=3", "data.seq_len=768")
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


def table(capsys, *arguments: str) -> tuple[int, dict[str, str], str]:
    """Return the exit status, the result of every check by its name, and all that was printed."""
    capsys.readouterr()
    status = verify.main([*SMALL, *arguments])
    text = capsys.readouterr().out
    return status, results(text), text


def results(text: str) -> dict[str, str]:
    rows = [line for line in text.splitlines() if re.search(r" (pass|FAIL|info)$", line)]
    return {row[: WIDTHS[0]].strip(): row.split()[-1] for row in rows}


def failed(found: dict[str, str]) -> set[str]:
    return {name for name, result in found.items() if result == "FAIL"}


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


# Planted bugs: what is patched, with which configuration it shows, which lines must fail, and lines that must not.


def forget_windows(patch):
    """Let the kernel compute everything before the last visible key."""
    whole = TorchKernel._rectangles
    widened = lambda tile: replace(tile, lo=1 - tile.q_count)  # noqa: E731
    patch.setattr(TorchKernel, "_rectangles", lambda self, tiles: whole(self, [widened(tile) for tile in tiles]))


def swap_positions(patch):
    right = Layout.positions

    def swapped(self, rank, total):
        positions = right(self, rank, total)
        positions[[2, 5]] = positions[[5, 2]]
        return positions

    patch.setattr(Layout, "positions", swapped)


def lose_a_hop_of_dk(patch):
    right = Ring.backward

    def backward(self, ring, needs, k, v, *, attend):
        def one_lost(source, heads, k_part, v_part):
            dk, dv = attend(source, heads, k_part, v_part)
            return (torch.zeros_like(dk) if (ring.rank, source) == (2, 1) else dk), dv

        return right(self, ring, needs, k, v, attend=one_lost)

    patch.setattr(Ring, "backward", backward)


def lose_sink_gradients(patch):
    right = Attention.backward

    def backward(ctx, *grads):
        dq, dk, dv, dsink, _ = right(ctx, *grads)
        return dq, dk, dv, torch.zeros_like(dsink), None

    patch.setattr(Attention, "backward", staticmethod(backward))


def shift_labels_after_sharding(patch):
    right = check_data.shard_samples

    def shard(samples, **options):
        batch = right(samples, **options)
        labels = torch.full_like(batch.labels, IGNORED)
        labels[:, :-1] = batch.tokens[:, 1:]
        return replace(batch, labels=labels)

    for module in (check_data, check_model):
        patch.setattr(module, "shard_samples", shard)


def number_positions_by_rank(patch):
    right = check_data.shard_samples

    def shard(samples, **options):
        batch = right(samples, **options)
        return replace(batch, positions=torch.arange(len(batch.positions)))

    for module in (check_data, check_model):
        patch.setattr(module, "shard_samples", shard)


def ignore_documents(patch):
    right = AttentionConfig.mask
    patch.setattr(AttentionConfig, "mask", lambda self, bounds: right(replace(self, documents=False), bounds))


def make_an_extra_hop(patch):
    right = Ring.forward

    def forward(self, ring, needs, k, v, *, attend):
        right(self, ring, needs, k, v, attend=attend)
        after, before = (ring.rank + 1) % ring.size, (ring.rank - 1) % ring.size
        ring.exchange({after: [k]}, {before: [torch.empty_like(k)]}).wait()

    patch.setattr(Ring, "forward", forward)


def fetch_everything(patch):
    right = plan_module.needs_of

    def all_of(layout, masks, teams, *, total):
        whole = tuple(tuple((0, total // teams.count) for _ in teams.members) for _ in teams.members)
        return replace(right(layout, masks, teams, total=total), keys=whole)

    patch.setattr(plan_module, "needs_of", all_of)


def lose_a_tile(patch):
    right = plan_module.tiles_between
    patch.setattr(plan_module, "tiles_between", lambda q, k, **options: right(q, k, **options)[1:])


def compute_a_tile_twice(patch):
    right = plan_module.tiles_between

    def twice(q, k, **options):
        tiles = right(q, k, **options)
        return (*tiles[:1], *tiles)

    patch.setattr(plan_module, "tiles_between", twice)


def see_one_key_ahead(patch):
    right = plan_module.tiles_between

    def ahead(q, k, **options):
        return tuple(replace(tile, hi=min(tile.hi + 1, tile.k_count - 1)) for tile in right(q, k, **options))

    patch.setattr(plan_module, "tiles_between", ahead)


def round_angles(patch):
    def table(positions, *, head_dim, theta, dtype=torch.float32):
        rates = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
        angles = positions.float()[:, None] * rates
        return angles.cos().to(dtype), angles.sin().to(dtype)

    patch.setattr(check_data, "rope_table", table)


def skip_the_last_round(patch):
    """Let a layout lose tokens, but only of long sequences."""
    right = balance_module.plan.__wrapped__

    def short(layout, masks, schedule, *, rank, total):
        made = right(layout, masks, schedule, rank=rank, total=total)
        return replace(made, hops=made.hops[:-1]) if total > 1000 else made

    class Planner:
        __wrapped__ = staticmethod(short)

    patch.setattr(balance_module, "plan", Planner)


def round_queries(patch):
    right = TorchKernel.forward

    def forward(self, q, k, v, **options):
        right(self, q.bfloat16().to(q.dtype) if q.dtype == torch.float32 else q, k, v, **options)

    patch.setattr(TorchKernel, "forward", forward)


def add_noise(patch):
    right = TorchKernel.forward

    def forward(self, q, k, v, *, partial, **options):
        right(self, q, k, v, partial=partial, **options)
        if q.dtype == torch.float32:
            partial.out.mul_(1 + 1e-7 * torch.rand(()))

    patch.setattr(TorchKernel, "forward", forward)


def raise_in_the_backward_pass(patch):
    def backward(self, q, k, v, **options):
        raise ZeroDivisionError("planted")

    patch.setattr(TorchKernel, "backward", backward)


BUGS = [
    (
        forget_windows,
        "attention=ring attention.window=6",
        {
            "float64: out vs dense",
            "float64: lse vs dense",
            "leak probes, float64: forward",
            "decoder: loss vs one rank",
        },
        {"plan: pairs computed once", "mask: pairs as configured", "layout: round trip"},
    ),
    (swap_positions, "attention=zigzag", {"layout: round trip"}, {"plan: pairs computed once"}),
    (
        lose_a_hop_of_dk,
        "attention.backward=rotate_kv",
        {"float64: dk vs dense", "float32: dk vs float64, rms", "decoder: worst gradient"},
        {"float64: out vs dense", "float64: dq vs dense", "float64: dv vs dense", "sent backward: as planned"},
    ),
    (
        lose_sink_gradients,
        "model.sink_logits=true",
        {"float64: d(sink logits) vs dense", "decoder: worst gradient"},
        {"float64: out vs dense", "float64: dk vs dense", "decoder: loss vs one rank"},
    ),
    (
        shift_labels_after_sharding,
        "attention=striped",
        {"labels: the next token", "decoder: loss vs one rank"},
        {"float64: out vs dense", "tokens", "positions for RoPE"},
    ),
    (
        number_positions_by_rank,
        "attention=ring",
        {"positions for RoPE", "decoder: loss vs one rank", "decoder: worst gradient"},
        {"float64: out vs dense", "labels: count over ranks"},
    ),
    (
        ignore_documents,
        "attention=striped",
        {"mask: pairs as configured", "plan: pairs computed once", "float64: out vs dense", "decoder: leak probes"},
        {"labels: the next token", "sent forward: as planned"},
    ),
    (
        make_an_extra_hop,
        "attention=striped",
        {"sent forward: as planned", "sent forward: textbook, no mask"},
        {"float64: out vs dense", "decoder: worst gradient", "sent backward: as planned"},
    ),
    (fetch_everything, "attention=ring attention.window=3", {"plan: shards fetched"}, {"float64: out vs dense"}),
    (lose_a_tile, "attention=zigzag", {"plan: pairs computed once", "float64: out vs dense"}, {"layout: round trip"}),
    (compute_a_tile_twice, "attention=zigzag", {"plan: pairs computed once", "float64: out vs dense"}, {"tokens"}),
    (
        see_one_key_ahead,
        "attention=ring",
        {"plan: pairs computed once", "leak probes, float64: forward", "leak probes, float64: backward"},
        {"mask: pairs as configured"},
    ),
    (round_angles, "data.seq_len=3145728", {"RoPE at position 3,145,727"}, {"positions for RoPE"}),
    (
        skip_the_last_round,
        "data.seq_len=3072",
        {"plan: pairs of 3,072 tokens"},
        {"plan: pairs computed once", "float64: out vs dense"},
    ),
    (round_queries, "attention=striped", {"float32: out vs float64, rms"}, {"float64: out vs dense"}),
    (add_noise, "attention=striped", {"two runs, bit by bit"}, {"float64: out vs dense"}),
    (
        raise_in_the_backward_pass,
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
    lose_a_hop_of_dk(monkeypatch)
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


def verify_on_a_rank(rank, world_size, group, overrides, bug=None):
    """Verify on a pooled rank; return status and text."""
    with pytest.MonkeyPatch.context() as patch:
        if bug is not None:
            globals()[bug](patch)
        config = load_config(overrides)
        degrees = check_world(config, world_size=world_size, per_machine=world_size)
        out = io.StringIO()
        status = verify.verify_ranks(
            config, degrees=degrees, per_machine=world_size, device=torch.device("cpu"), tokens=15, out=out
        )
        return status, out.getvalue()


def average_over_ranks(patch):
    """Make FSDP2 divide gradients by the number of ranks, as it does by default."""
    from torch.distributed.fsdp import FSDPModule

    patch.setattr(FSDPModule, "set_gradient_divide_factor", lambda self, factor: None)
    patch.setattr(FSDPModule, "set_force_sum_reduction_for_comms", lambda self, enable: None)


def lose_values_on_the_last_rank(patch):
    """Zero what one rank sends, as a broken link would."""
    from longctx.parallel.transport import ProcessGroupTransport

    right = ProcessGroupTransport.exchange

    def exchange(self, outgoing, incoming, *, lane=0):
        if self.rank == self.size - 1 and torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
            outgoing = {peer: [torch.zeros_like(x) for x in tensors] for peer, tensors in outgoing.items()}
        return right(self, outgoing, incoming, lane=lane)

    patch.setattr(ProcessGroupTransport, "exchange", exchange)


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
