"""`auto`: which layout and schedule are chosen, what is left alone, and what is said about it."""

import dataclasses
import random

import pytest
import torch
import yaml

from longctx.attention_config import AttentionConfig
from longctx.config import load_config
from longctx.kernels.mask import Mask, causal, documents, sliding_window
from longctx.parallel.links import Speeds
from longctx.parallel.schedule import Shape
from longctx.planner import CLOSE, Choice, candidates, choose, label
from longctx.setup import check_world
from tests.support.training import losses, run_training, write_corpus

K = 1024
AUTO = AttentionConfig(layout="auto", schedule="auto")
GQA = Shape(heads=32, kv_heads=8, head_dim=128, v_head_dim=128, dtype=torch.bfloat16)
FAST = Speeds(local=300e9, network=45e9, latency=20e-6, flops=400e12, call=50e-6)
SLOW = dataclasses.replace(FAST, local=1e9, network=1e9)


def chosen(
    *masks: Mask,
    total: int,
    cp: int = 8,
    shape: Shape = GQA,
    speeds: Speeds = FAST,
    per_machine: int = 8,
    config: AttentionConfig = AUTO,
) -> Choice:
    return choose(config, masks, total=total, cp=cp, shape=shape, speeds=speeds, per_machine=per_machine)


def packed(total: int, *, mean_log: float = 7.6, spread: float = 1.3, seed: int = 0) -> Mask:
    """Return causal attention over documents of log-normal lengths."""
    draw, bounds = random.Random(seed), [0]
    while bounds[-1] < total:
        length = min(int(draw.lognormvariate(mean_log, spread)) + 1, total // 4)
        bounds.append(min(bounds[-1] + length, total))
    return causal() & documents(tuple(bounds))


def times(choice: Choice) -> dict[str, float]:
    return {label(config): each.seconds for config, each in choice.ranked}


def test_one_causal_document_is_balanced():
    choice = chosen(causal(), total=128 * K)
    assert choice.config.layout in ("striped", "zigzag")
    found = times(choice)
    assert found["contiguous x ring"] > 1.8 * found["zigzag x ring"] > 1.7 * found["striped(1) x ring"]


def test_packed_documents_are_striped_where_a_tile_costs_little():
    choice = chosen(*(packed(128 * K, seed=seed) for seed in range(3)), total=128 * K, speeds=_calls(1e-6))
    assert choice.sequences == 3 and choice.config.layout == "striped"
    found = times(choice)
    assert found["striped(1) x ring"] < 0.6 * min(found["zigzag x ring"], found["contiguous x ring"])


def test_many_small_tiles_are_not_striped_where_a_tile_costs_much():
    choice = chosen(packed(128 * K, mean_log=6.0, spread=0.5), total=128 * K, speeds=_calls(1e-3))
    assert label(choice.config) == "contiguous x ring"


def _calls(seconds: float) -> Speeds:
    return dataclasses.replace(FAST, call=seconds)


def test_a_window_stays_contiguous_and_only_the_halo_travels():
    choice = chosen(sliding_window(4095), total=8 * 128 * K)
    assert label(choice.config) == "contiguous x ring"
    best = next(each for config, each in choice.ranked if config == choice.config)
    # Forward K and V of 4095 tokens, backward those again and their gradients in float32.
    assert best.bytes == 4095 * 8 * 256 * (2 + 2 + 4)


def test_slow_links_share_heads():
    assert label(chosen(causal(), total=128 * K, speeds=SLOW).config) == "contiguous x ulysses"
    few = chosen(causal(), total=128 * K, speeds=SLOW, shape=dataclasses.replace(GQA, heads=4, kv_heads=2))
    assert (few.config.schedule, few.config.ulysses) == ("usp", 4)


def test_slow_links_between_machines_are_crossed_once():
    """Two machines: K/V go round inside of each, or heads are shared there; no plain ring and no all-to-all across."""
    speeds = dataclasses.replace(FAST, network=2e9)
    choice = chosen(causal(), total=256 * K, cp=16, speeds=speeds, shape=dataclasses.replace(GQA, kv_heads=4))
    far = {label(config): each.far_bytes for config, each in choice.ranked}
    assert far[label(choice.config)] < 0.5 * far["striped(1) x ring"]
    found = times(choice)
    assert found["striped(1) x double_ring(inner=8)"] < found["striped(1) x ring"]


def test_fewer_heads_than_ranks_never_share_them_all():
    choice = chosen(causal(), total=128 * K, speeds=SLOW, shape=dataclasses.replace(GQA, heads=4, kv_heads=2))
    schedules = {config.schedule for config, _ in choice.ranked}
    assert "ulysses" not in schedules and {"ring", "usp", "all_gather"} <= schedules
    odd = chosen(causal(), total=128 * K, shape=dataclasses.replace(GQA, heads=7, kv_heads=7))
    assert {config.schedule for config, _ in odd.ranked} == {"ring", "all_gather"}


def test_everything_that_is_chosen_is_a_config_that_a_user_could_write():
    for config in candidates(AUTO, total=128 * K, cp=8, heads=32, per_machine=4):
        config.validate()
        assert "auto" not in (config.layout, config.schedule)
        config.make_schedule(8, heads=32, kv_heads=8, per_machine=4)
    found = list(candidates(AUTO, total=128 * K, cp=8, heads=32, per_machine=4))
    assert len(set(map(label, found))) == len(found)


def test_what_is_fixed_stays_fixed():
    fixed = AttentionConfig(layout="zigzag", schedule="auto", window=9, kernel="reference")
    choice = chosen(sliding_window(8), total=8 * K, config=fixed)
    assert {config.layout for config, _ in choice.ranked} == {"zigzag"}
    assert (choice.config.window, choice.config.kernel) == (9, "reference")
    fixed = AttentionConfig(layout="auto", schedule="usp", ulysses=2, innermost="ring", backward="rotate_q")
    for config, _ in chosen(causal(), total=8 * K, config=fixed).ranked:
        assert (config.schedule, config.ulysses, config.innermost, config.backward) == ("usp", 2, "ring", "rotate_q")
    wide = AttentionConfig(layout="striped", width=64, schedule="auto")
    assert {config.width for config, _ in chosen(causal(), total=8 * K, config=wide).ranked} == {64}


def test_one_rank_has_nothing_to_choose():
    assert label(chosen(causal(), total=8 * K, cp=1).config) == "contiguous x local"
    fixed = dataclasses.replace(AUTO, layout="zigzag")
    assert label(chosen(causal(), total=8 * K, cp=1, config=fixed).config) == "zigzag x ring"
    fixed = dataclasses.replace(AUTO, schedule="local")
    assert label(chosen(causal(), total=8 * K, cp=1, config=fixed).config) == "contiguous x local"


def test_nothing_legal_is_an_error_with_the_schedules_own_words():
    fixed = AttentionConfig(layout="auto", schedule="ulysses")
    with pytest.raises(ValueError, match="must divide model.num_heads=4"):
        chosen(causal(), total=8 * K, config=fixed, shape=dataclasses.replace(GQA, heads=4, kv_heads=2))


def test_the_choice_is_the_first_of_the_close_ones_and_the_table_says_so():
    choice = chosen(causal(), total=128 * K)
    best = choice.ranked[0][1].seconds
    mine = next(each for config, each in choice.ranked if config == choice.config)
    assert mine.seconds <= best * (1 + CLOSE)
    lines = choice.explain(rows=3).splitlines()
    assert len(lines) == 6 and lines[0].startswith(f"auto: {label(choice.config)}, ")
    assert "400 TFLOP/s, 50 us per tile, 300 GB/s in a machine" in lines[1]
    assert sum(line.startswith("  * ") for line in lines) == 1
    far = dataclasses.replace(choice, config=choice.ranked[-1][0]).explain(rows=3).splitlines()
    assert far[-1].startswith(f"  * {label(choice.ranked[-1][0])}")


def test_sampled_documents_are_told():
    fixed = AttentionConfig(layout="striped", schedule="ring")
    mask = packed(512 * 64, mean_log=5.0)
    assert "counted with 12 documents that stand for all" in chosen(mask, total=512 * 64, cp=64, config=fixed).explain()


def test_keys_of_config():
    config = load_config(["attention=auto", "parallel.network_gb_per_s=2.5", "parallel.cp=2"])
    assert config.parallel.network_gb_per_s == 2.5
    assert check_world(config, world_size=2, per_machine=2).cp == 2
    for wrong in ("attention.width=4", "attention.ulysses=2", "parallel.latency_us=-1"):
        with pytest.raises(ValueError, match=wrong.split("=")[0]):
            load_config(["attention=auto", wrong])


def test_a_run_records_what_was_chosen(gloo_pool, tmp_path):
    """Rank 0 decides, every rank does the same, and the resolved config has names."""
    corpus, run_dir = write_corpus(tmp_path / "text"), tmp_path / "run"
    paths = [f"data.path={corpus}", f"data.cache_dir={tmp_path / 'cache'}", f"run_dir={run_dir}"]
    gloo_pool.run(run_training, 2, ["attention=auto", "train.steps=3", *paths])
    assert len(losses(run_dir)) == 3
    attention = yaml.safe_load((run_dir / "config.yaml").read_text())["attention"]
    assert attention["layout"] in ("contiguous", "zigzag", "striped") and attention["schedule"] != "auto"
