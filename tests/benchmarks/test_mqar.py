"""The recall benchmark: its generator, what it expects, the same curve on two ranks, and the order of the mixers."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from _mqar_mixers import MIXERS, SETTINGS, layers_of, told
from _mqar_model import TAPS, Model, make_place, window
from _mqar_task import Task, reach_bound
from _mqar_train import Learner, Recipe, train
from mqar import RATES, SLACK, best, differences, digits, kept, missed

from longctx.loss import IGNORED
from longctx.mixers.sparse.seer import Seer
from longctx.parallel.layout import Layout
from longctx.parallel.transport import Alone, ProcessGroupTransport

SIZES = (Task(64, 8, 256), Task(128, 16, 512), Task(18, 4, 14))


@pytest.mark.parametrize("task", SIZES)
def test_sequences_are_distinct_pairs_and_then_every_key_once(task: Task) -> None:
    sequences, labels = task.draw(300, seed=5)
    assert sequences.shape == labels.shape == (300, task.tokens)
    prefix = 2 * task.pairs
    for sequence, label in zip(sequences.tolist(), labels.tolist(), strict=True):
        keys, values = sequence[0:prefix:2], sequence[1:prefix:2]
        assert len(set(keys)) == len(set(values)) == task.pairs
        assert all(1 <= key < task.vocabulary // 2 for key in keys)
        assert all(task.vocabulary // 2 <= value < task.vocabulary for value in values)
        asked = [position for position in range(prefix, task.tokens) if sequence[position]]
        assert all(position % 2 == 0 for position in asked)
        assert sorted(sequence[position] for position in asked) == sorted(keys)
        answers = dict(zip(keys, values, strict=True))
        expected = [answers[sequence[p]] if p in asked else IGNORED for p in range(task.tokens)]
        assert label == expected


def test_every_key_and_value_occurs() -> None:
    sequences, _ = Task(16, 4, 20).draw(500, seed=0)
    assert set(sequences[:, 0:8:2].flatten().tolist()) == set(range(1, 10))
    assert set(sequences[:, 1:8:2].flatten().tolist()) == set(range(10, 20))


def test_sequences_depend_on_the_seed_alone() -> None:
    task = SIZES[0]
    (first, labels), (again, same), (other, _) = (task.draw(50, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first, again) and torch.equal(labels, same)
    assert not torch.equal(first, other)


def test_slots_are_drawn_by_a_power_law_without_replacement() -> None:
    """Slots i then j: p_i p_j / (1 - p_i) with p_i proportional to i^-0.99; within 5 standard deviations."""
    count, slots = 40_000, 4
    sequences, _ = Task(12, 2, 16).draw(count, seed=1)
    likely = torch.arange(1, slots + 1).double() ** -0.99
    likely /= likely.sum()
    first, second = ((sequences[:, 4::2] == sequences[:, key : key + 1]).int().argmax(dim=1) for key in (0, 2))
    for i in range(slots):
        for j in range(slots):
            found = ((first == i) & (second == j)).sum().item()
            expected = 0.0 if i == j else (count * likely[i] * likely[j] / (1 - likely[i])).item()
            assert abs(found - expected) <= 5 * expected**0.5, (i, j, found, expected)


@pytest.mark.parametrize(("tokens", "pairs", "vocabulary"), [(63, 8, 256), (64, 17, 256), (64, 8, 16), (64, 0, 16)])
def test_impossible_sizes_are_refused(tokens: int, pairs: int, vocabulary: int) -> None:
    with pytest.raises(ValueError, match="pairs"):
        Task(tokens, pairs, vocabulary)


def test_the_reach_of_a_window_is_what_the_model_sees() -> None:
    """Gradients of a query's logits: from nothing before the window and the taps, from something at their far end."""
    task = Task(40, 4, 16)
    place = make_place("window", Alone(), layout=Layout("contiguous", 1), passing="ring", total=task.tokens)
    model = Model("window", vocabulary=task.vocabulary, width=8, seed=0).double()
    sequences, labels = task.draw(20, seed=2)
    seen = []
    for row, position in (labels != IGNORED).nonzero().tolist():
        found: list[torch.Tensor] = []
        hook = model.embedding.register_forward_hook(lambda *arguments, found=found: found.append(arguments[-1]))
        asked = torch.zeros(1, task.tokens, dtype=torch.bool)
        asked[0, position] = True
        logits = model(sequences[row : row + 1], asked=asked, place=place)
        hook.remove()
        (gradient,) = torch.autograd.grad(logits.square().sum(), found)
        visible = gradient[0].abs().sum(dim=-1) > 0
        key = sequences[row, :8:2].tolist().index(sequences[row, position].item())
        seen.append(bool(visible[2 * key]))
    assert 0 < sum(seen) < len(seen)
    reach = reach_bound(sequences, labels, pairs=task.pairs, window=window(task.tokens), taps=TAPS)
    assert sum(seen) / len(seen) == pytest.approx(reach)


def curve(rank: int, world_size: int, group: torch.distributed.ProcessGroup, mixer: str) -> list[dict[str, float]]:
    """Train some steps on a pooled rank, in float64."""
    transport = ProcessGroupTransport(group) if world_size > 1 else Alone()
    recipe = Recipe(width=8, steps=6, every=2, batch=8, sequences=40, test=30, dtype="float64")
    tokens = 64 if layers_of(mixer).sparse else 20  # 8 blocks, of which a query sees 5
    return train(mixer, Task(tokens, 4, 24), recipe, lr=1e-2, seed=1, transport=transport)


@pytest.mark.parametrize("mixer", MIXERS)
def test_two_ranks_have_the_curve_of_one(gloo_pool, mixer: str) -> None:  # type: ignore[no-untyped-def]
    (alone,), shared = gloo_pool.run(curve, 1, mixer), gloo_pool.run(curve, 2, mixer)
    assert [row["step"] for row in alone] == [2, 4, 6]
    assert alone[0]["loss"] > alone[-1]["loss"]
    for rank in shared:
        for ours, theirs in zip(rank, alone, strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-11)
            assert ours["accuracy"] == theirs["accuracy"]


@pytest.mark.parametrize("kind", ["moba", "landmark", "sla"])
def test_sparse_attention_of_all_blocks(kind: str) -> None:
    """MoBA of all blocks is softmax attention; SLA begins so, its landmarks' grouped softmax never is."""
    task = Task(64, 8, 256)
    place = make_place("softmax", Alone(), layout=Layout("contiguous", 1), passing="ring", total=task.tokens)
    sequences, labels = task.draw(5, seed=3)
    every = replace(SETTINGS, **{kind: replace(SETTINGS.sparse_kind(kind), topk=8)})
    found = {}
    for mixer, settings in (("softmax", SETTINGS), (kind, every), (kind, SETTINGS)):
        model = Model(mixer, vocabulary=task.vocabulary, width=16, seed=0, settings=settings).double()
        logits = model(sequences, asked=labels != IGNORED, place=place)
        wanted = labels[labels != IGNORED]
        torch.nn.functional.cross_entropy(logits, wanted).backward()
        weights = dict(model.named_parameters())
        names = [name for name in weights if "rest_weight" not in name and "landmark_weight" not in name]
        found[mixer, settings is every] = [logits.detach(), *(weights[name].grad for name in names)]
    dense, whole, some = found["softmax", False], found[kind, True], found[kind, False]
    differ = [max((a - b).abs().max().item() for a, b in zip(dense, each, strict=True)) for each in (whole, some)]
    assert differ[1] > 1e-4
    assert (differ[0] < 1e-10) == (kind != "landmark"), differ


def test_seer_is_distilled_first_and_then_left_alone() -> None:
    """Its gate learns in the first third of the steps, from a loss of its own; tests are of what it chooses."""
    task, recipe = Task(64, 4, 24), Recipe(width=8, steps=6, batch=8)
    learner = Learner("seer", task, recipe, lr=1e-2, seed=0, transport=Alone())
    sequences = task.draw(8, seed=0)
    (gate,) = (weight for name, weight in learner.model.named_parameters() if name.endswith("gate_k"))
    modes, moved = [], []
    for _ in range(recipe.steps):
        before = gate.detach().clone()
        learner.step(*sequences)
        modes += [module.settings.mode for module in learner.model.modules() if isinstance(module, Seer)]
        moved.append(not torch.equal(gate, before))
        learner.accuracy(*sequences)
        assert all(module.settings.mode == "sparse" for module in learner.model.modules() if isinstance(module, Seer))
    assert modes == ["distill"] * 2 + ["sparse"] * 4
    assert moved == [True] * 2 + [False] * 4
    assert not learner.losses


def test_rows_of_other_settings_are_not_kept(tmp_path: Path) -> None:
    recipe = Recipe()
    rows = [
        {"mixer": "softmax", "environment": {"cpu": "an older one"}},
        {"mixer": "moba", "settings": told("moba")},
        {"mixer": "moba", "settings": {"moba": {**told("moba")["moba"], "topk": 2}}},
        {"mixer": "moba"},
    ]
    report = tmp_path / "mqar.json"
    report.write_text(json.dumps({"environment": {"cpu": "one"}, "recipe": asdict(recipe), "rows": rows}))
    assert kept(report, recipe) == [rows[0], {**rows[1], "environment": {"cpu": "one"}}]
    assert kept(report, Recipe(steps=3)) == []


def test_misses_and_leaks_are_told() -> None:
    row = {"mixer": "window", "size": "64:8:256", "seed": 0, "cp": 1, "lr": 0.1, "reach": 0.39}
    row["curve"] = [[2, 1.5, 0.4]]
    assert not missed([{**row, "accuracy": 0.39 + SLACK}])
    assert missed([{**row, "accuracy": 0.39 + 1.1 * SLACK}])
    assert missed([{**row, "mixer": "gdn", "accuracy": 0.98}])
    assert not missed([{**row, "mixer": "gdn", "accuracy": 0.99}])
    assert not missed([{**row, "mixer": "gdn", "accuracy": 0.0, "size": "32:4:64"}])
    assert missed([{**row, "mixer": "moba", "accuracy": 0.84}])
    assert not missed([{**row, "mixer": "moba", "accuracy": 0.84, "size": "128:16:512"}])
    other = {**row, "cp": 2, "curve": [[2, 1.500001, 0.4]]}
    assert digits(row) != digits(other)
    assert differences([row, other]) and not differences([row, {**row, "cp": 2}])
    assert not differences([row, {**other, "lr": 0.2}])


def test_the_best_learning_rate_counts() -> None:
    row = {"mixer": "gla", "size": "64:8:256", "seed": 0, "cp": 1, "lr": 0.1, "accuracy": 0.5}
    better, other = {**row, "lr": 0.2, "accuracy": 0.6}, {**row, "seed": 1, "accuracy": 0.1}
    assert best([row, better, other]) == best([better, other, row]) == [better, other]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_mixers_recall_what_they_see_and_can_store() -> None:
    """The window stays at its reach; of 12 pairs in states of width 32 elu+1 mixes some up, the others hardly any."""
    easy, hard = Task(48, 6, 64), Task(48, 12, 64)
    seen = reached("window", easy, Recipe(steps=400))
    reach = reach_bound(*easy.draw(Recipe.test, seed=1), pairs=easy.pairs, window=window(easy.tokens), taps=TAPS)
    assert reach - 0.05 < seen < reach + 0.05
    assert reached("gdn", easy, Recipe(steps=400)) > 0.98
    narrow = Recipe(steps=400, width=32)
    found = {mixer: reached(mixer, hard, narrow) for mixer in ("softmax", "linear", "lightning", "deltanet")}
    assert seen + 0.1 < found["linear"] < 0.9, found
    assert all(found[mixer] > 0.97 for mixer in ("softmax", "lightning", "deltanet")), found


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_sparse_attention_recalls_most_and_with_a_softmax_layer_all() -> None:
    """At the benchmark's own size and recipe: 5 of 8 blocks by the means of keys; one dense layer finds the rest.

    Of seed 0: with seed 1 the hybrid ends at 0.9885 (benchmarks/results/mqar.json).
    """
    task = Task(64, 8, 256)
    assert reached("moba", task, Recipe()) >= 0.85
    assert reached("mosa_full", task, Recipe()) >= 0.99


def reached(mixer: str, task: Task, recipe: Recipe) -> float:
    """Return the test accuracy at the end of a run."""
    return train(mixer, task, recipe, lr=RATES[0], seed=0, transport=Alone())[-1]["accuracy"]
