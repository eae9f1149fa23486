"""`longctx plan`: the table of ranks and hops, for real documents, without any process group."""

import pytest
import torch

from longctx.config import load_config
from longctx.kernels.mask import causal, per_head, sliding_window
from longctx.parallel.cost import in_bytes
from longctx.parallel.layout import Layout
from longctx.parallel.plan import plan
from longctx.parallel.schedule import Shape
from longctx.parallel.schedules.ring import Ring, Ulysses
from longctx.plan_command import main, table
from tests.support.training import write_corpus

SHAPE = Shape(heads=4, kv_heads=2, head_dim=8, v_head_dim=8, dtype=torch.float32)


def rows(layout, mask, schedule, *, cp=4, n=8):
    plans = [plan(Layout(layout, cp), (mask,), schedule, rank=rank, total=cp * n) for rank in range(cp)]
    return [line.split() for line in table(plans, SHAPE)[1 : cp + 1]]


def test_work_and_hops_are_shares_of_the_mean():
    """Contiguous causal, n = 8: a rank has 36 own pairs and 64 at each hop after as many as there are before it."""
    mean = (4 * 36 + 6 * 64) / 4
    for rank, row in enumerate(rows("contiguous", causal(), Ring())):
        work = [36] + [64 if hop <= rank else 0 for hop in range(1, 4)]
        assert [float(cell) for cell in row[1:6]] == pytest.approx(
            [sum(work) / mean, *(4 * w / mean for w in work)], abs=6e-3
        )
    for row in rows("zigzag", causal(), Ring()):
        assert float(row[1]) == 1.0


def test_heads_of_their_own_are_shared_unevenly_by_ulysses():
    heads = per_head([causal(), sliding_window(1), sliding_window(1), causal()])
    work = [float(row[1]) for row in rows("striped", heads, Ulysses())]
    assert work[0] == work[3] > 1 > work[1] == work[2]


def test_the_command(tmp_path, capsys):
    data = ["data=txt", f"data.path={write_corpus(tmp_path / 'text')}", f"data.cache_dir={tmp_path / 'cache'}"]
    assert main([*data, "data.seq_len=512", "parallel.cp=8", "attention=zigzag", "--per-machine", "4"]) == 0
    told = capsys.readouterr().out
    assert "plan: zigzag x ring, cp=8, 512 tokens" in told and told.count("\n   ") >= 8 and "hop 7" in told
    assert main([*data, "data.seq_len=512", "attention=auto", "parallel.cp=4"]) == 0
    assert "auto:" in capsys.readouterr().out
    for wrong, words in (
        (["data.seq_len=510", "parallel.cp=4"], "data.seq_len=510 cannot be divided by parallel.cp=4"),
        (["--per-machine", "x"], "--per-machine needs a number of ranks >= 1; given 'x'"),
        (["attention=spiral"], "spiral"),
    ):
        assert main([*data, *wrong]) == 2
        assert words in capsys.readouterr().err


def test_a_hybrid_stack(tmp_path, capsys):
    """Every kind of softmax layer has its plan; linear layers say where they run and what they send."""
    data = ["data=txt", f"data.path={write_corpus(tmp_path / 'text')}", f"data.cache_dir={tmp_path / 'cache'}"]
    run = [*data, "data.seq_len=512", "parallel.cp=4", "attention.layout=striped", "model.num_layers=6"]
    assert main([*run, "attention.layers=gdn*4+window+full", "attention.window=64"]) == 0
    told = capsys.readouterr().out
    assert "plan of window layers: striped" in told and "plan of full layers: striped" in told
    assert "linear layers: 4 of gdn*4 + window + full, contiguous, all_gather: a rank sends at most" in told
    assert "relayout: 1 of the hidden states per forward" in told
    assert main([*run, "attention=auto", "attention.layout=auto", "attention.layers=gdn*2+full"]) == 0
    told = capsys.readouterr().out
    assert "softmax layers: what linear ones send (states, halos, relayouts) is not in these numbers" in told
    assert main([*data, "data.seq_len=512", "parallel.cp=4", "attention=lightning"]) == 0
    told = capsys.readouterr().out
    assert "plan" not in told and told.count("linear layers: ") == 1
    assert main([*data, "attention=gdn", "mixers.gdn.kernel=torch", "mixers.gdn.chunk_size=48"]) == 2
    assert "mixers.gdn.kernel=torch, mixers.gdn.chunk_size=48: " in capsys.readouterr().err


def test_sparse_layers(tmp_path, capsys):
    """What is known before anything is selected: settings, pairs, what routing tells, how K/V move."""
    data = ["data=txt", f"data.path={write_corpus(tmp_path / 'text')}", f"data.cache_dir={tmp_path / 'cache'}"]
    run = [*data, "data.seq_len=512", "parallel.cp=4"]
    assert main([*run, "attention=moba", "mixers.moba.block_size=32", "attention.documents=false"]) == 0
    told = capsys.readouterr().out
    assert "plan of moba layers: zigzag x ring, cp=4, 512 tokens; kernel auto; block_size 32, topk 3" in told
    pairs = 16 * (32 * 33 // 2) + 32 * 32 * (1 + 2 * 14)
    assert f"pairs: about {pairs:,} for each head, {pairs / (512 * 513 // 2):.1%} of causal ones" in told
    sent = 4 * 2 * 32 * 4 * 3 / 1e3  # blocks of a rank, KV heads, head dim, bytes, other ranks
    assert f"routing: a rank sends means of blocks' keys: {sent:.1f} kB forward, 0.0 kB backward" in told
    assert "K/V: what is selected decides" in told and "(attention.kv_moves=auto)" in told
    assert main([*run, "attention=s2", "attention.kv_moves=blocks"]) == 0
    told = capsys.readouterr().out
    assert "routing" not in told and "K/V: the selected blocks alone" in told
    small = [*run, "attention=moba", "mixers.moba.block_size=32"]
    assert main([*small, "attention.schedule=ulysses"]) == 0
    told = capsys.readouterr().out
    sent = 128 * 3 * 2 * 4 * 3 / 1e3  # tokens of a rank, slots, both ends, bytes, other ranks; a head for each
    assert f"selection: a rank tells those that share its heads: {sent:.1f} kB forward" in told
    assert "K/V: as of dense attention\n" in told
    assert main([*small, "attention.schedule=all_gather", "attention.gather_heads=1", "mixers.moba.topk=1"]) == 0
    told = capsys.readouterr().out
    assert "selection" not in told and "routing" not in told
    assert "K/V: on the schedule, without what nobody selected (attention.kv_moves=auto, attention.gather_he" in told
    assert main([*run, "attention=moba"]) == 2
    assert "mixers.moba.block_size=512 at parallel.cp=4: zigzag cuts blocks" in capsys.readouterr().err


def test_a_kernel_that_no_machine_takes_is_refused(capsys):
    pytest.importorskip("triton")
    assert main(["attention.kernel=triton", "engine.dtype=float64", "parallel.cp=2"]) == 2
    assert "attention.kernel=triton cannot serve this" in capsys.readouterr().err
    assert main(["attention.kernel=torch", "model.head_dim=0"]) == 2


def test_what_sparse_layers_send_besides_what_is_selected(tmp_path, capsys):
    data = ["data=txt", f"data.path={write_corpus(tmp_path / 'text')}", f"data.cache_dir={tmp_path / 'cache'}"]
    run = [*data, "data.seq_len=512", "parallel.cp=4", "attention.documents=false", "attention.layout=contiguous"]
    small = ["mixers.nsa.window=64", "attention.backward=rotate_kv", "engine.dtype=float32"]
    assert main([*run, "attention=nsa", *small]) == 0
    model = load_config(run).model
    # A rank between others gives 63 keys and values twice, and their gradients home.
    sent = 63 * 2 * model.num_kv_heads * model.head_size * (2 + 1) * 4
    words = f"  window: K/V of the last 64 tokens: a rank sends at most {in_bytes(sent)}\n"
    assert words in capsys.readouterr().out

    assert main([*run, "attention=sla"]) == 0
    told = capsys.readouterr().out
    assert "  states of linear attention: a rank sends at most" in told and "  K/V once more, in float32" in told


def test_moves_without_effect_are_refused(tmp_path, capsys):
    data = ["data=txt", f"data.path={write_corpus(tmp_path / 'text')}", f"data.cache_dir={tmp_path / 'cache'}"]
    run = [*data, "attention=moba", "attention.schedule=usp", "mixers.moba.block_size=64", "data.seq_len=512"]
    run.append("attention.kv_moves=blocks")
    assert main([*run, "parallel.cp=2"]) == 2
    assert "attention.kv_moves=blocks has no effect with attention.schedule=usp" in capsys.readouterr().err
    assert main([*run, "parallel.cp=4", "attention.ulysses=2"]) == 0
