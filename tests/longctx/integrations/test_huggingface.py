"""Hugging Face models with attn_implementation="longctx": logits and every gradient are one rank's, and eager's."""

import contextlib
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

pytest.importorskip("transformers")

from longctx.integrations.huggingface import context_parallel
from longctx.integrations.huggingface_batch import shard_batch
from longctx.integrations.huggingface_checks import NAME
from longctx.loss import IGNORED, token_loss_sum
from longctx.parallel.layout import Layout
from longctx.parallel.registry import SCHEDULES
from tests.support.huggingface import BATCH, DOCUMENTS, LAYOUTS, MODELS, ONE, TOTAL, in_float64, make_batch, make_model
from tests.support.tolerance import assert_within_budget

ROOT = Path(__file__).resolve().parents[3]
TOLERANCE = 1e-9


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def step(
    rank: int, world_size: int, group, kind: str, layout: Layout, packed: bool, schedule="ring", checkpointing=False
):
    """Logits, loss and summed gradients of a context-parallel step; backward runs outside the context."""
    model = make_model(kind, NAME)
    if checkpointing:
        model.gradient_checkpointing_enable()
    bounds = DOCUMENTS if packed else None
    shard = shard_batch(*make_batch(), layout=layout, rank=rank, cu_seqlens=bounds)
    with context_parallel(layout=layout, group=group, schedule=schedule, cu_seqlens=bounds):
        logits = model(**shard.inputs).logits
    loss = token_loss_sum(logits, shard.labels) / shard.label_count
    loss.backward()
    for gradient in gradients(model).values():
        dist.all_reduce(gradient, group=group)
    dist.all_reduce(loss := loss.detach(), group=group)
    return logits.detach(), loss, gradients(model)


@in_float64
def on_ranks(*arguments):
    return step(*arguments)


@in_float64
def on_one_rank(kind: str, packed: bool):
    """The same step without any process group, by a layout of cp=1."""
    model, bounds = make_model(kind, NAME), DOCUMENTS if packed else None
    shard = shard_batch(*make_batch(), layout=ONE, rank=0, cu_seqlens=bounds)
    with context_parallel(layout=ONE, cu_seqlens=bounds):
        logits = model(**shard.inputs).logits
    loss = token_loss_sum(logits, shard.labels) / shard.label_count
    loss.backward()
    return logits.detach(), loss.detach(), gradients(model)


@in_float64
def by_eager(kind: str, packed: bool):
    """The same step by transformers alone, each document by itself: not all of its models keep packed ones apart."""
    model, (input_ids, labels) = make_model(kind, "eager"), make_batch()
    logits, shifted = [], []
    for row in range(BATCH):
        for begin, end in pairwise(DOCUMENTS[row] if packed else (0, TOTAL)):
            logits.append(model(input_ids=input_ids[row : row + 1, begin:end], use_cache=False).logits[0])
            shifted.append(F.pad(labels[row, begin + 1 : end], (0, 1), value=IGNORED))
    loss = F.cross_entropy(torch.cat(logits), torch.cat(shifted), ignore_index=IGNORED)
    loss.backward()
    return torch.cat(logits).detach().unflatten(0, (BATCH, TOTAL)), loss.detach(), gradients(model)


def assert_same(got, wanted) -> None:
    torch.testing.assert_close(got[0], wanted[0], rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(got[1], wanted[1], rtol=0, atol=TOLERANCE)
    assert got[2].keys() == wanted[2].keys()
    for name, gradient in wanted[2].items():
        assert gradient.abs().max() > 1e-6, f"{name}: a gradient of nothing proves nothing"
        torch.testing.assert_close(got[2][name], gradient, rtol=0, atol=TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")


def together(ranks, layout: Layout):
    return layout.unshard([rank[0] for rank in ranks], dim=1), ranks[0][1], ranks[0][2]


@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("kind", MODELS)
def test_two_ranks_one_rank_and_eager_agree(gloo_pool, kind, packed):
    wanted = by_eager(kind, packed)
    one = on_one_rank(kind, packed)
    assert_same(one, wanted)
    for name in ("zigzag", "striped"):
        two = together(gloo_pool.run(on_ranks, 2, kind, LAYOUTS[name], packed), LAYOUTS[name])
        assert_same(two, one)
        assert_same(two, wanted)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_every_layout(gloo_pool, layout):
    two = together(gloo_pool.run(on_ranks, 2, "llama", layout, True), layout)
    assert_same(two, by_eager("llama", True))


@pytest.mark.parametrize("schedule", [name for name in SCHEDULES if name not in ("ring", "local")])
def test_every_schedule(gloo_pool, schedule):
    layout = LAYOUTS["zigzag"]
    two = together(gloo_pool.run(on_ranks, 2, "qwen2", layout, True, schedule), layout)
    assert_same(two, by_eager("qwen2", True))


def test_activation_checkpointing_recomputes_outside_the_context(gloo_pool):
    plain, again = (gloo_pool.run(step, 2, "qwen2", LAYOUTS["zigzag"], True, "ring", on) for on in (False, True))
    for rank in range(2):
        assert torch.equal(again[rank][0], plain[rank][0])
        for name, gradient in plain[rank][2].items():
            assert torch.equal(again[rank][2][name], gradient), name


def loss_by_transformers(rank: int, world_size: int, group):
    """Their own loss function, given labels that are shifted already and the global count."""
    model, layout = make_model("llama", NAME), Layout("striped", world_size)
    shard = shard_batch(*make_batch(), layout=layout, rank=rank)
    ready = {"labels": shard.labels, "shift_labels": shard.labels, "num_items_in_batch": shard.label_count}
    with context_parallel(layout=layout, group=group):
        loss = model(**shard.inputs, **ready).loss.detach()
    dist.all_reduce(loss, group=group)
    return loss


def test_the_loss_function_of_transformers_with_shifted_labels(gloo_pool):
    _, wanted, _ = by_eager("llama", False)
    for loss in gloo_pool.run(loss_by_transformers, 2):  # it computes in float32
        torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=0)


def test_autocast():
    """q and k come in float32 from RoPE, v in bfloat16; as exact as eager under the same autocast."""
    input_ids, _ = make_batch()

    def run(implementation: str, autocast: bool) -> torch.Tensor:
        model = make_model("llama", implementation).float()
        context = context_parallel(layout=ONE) if implementation == NAME else contextlib.nullcontext()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), context:
            return model(input_ids, use_cache=False).logits

    assert_within_budget(run(NAME, True), run("eager", True), run("eager", False))


@pytest.mark.slow
def test_the_example_prints_the_same_losses_on_one_rank_and_two():
    def losses(ranks: int) -> list[str]:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        done = subprocess.run(
            [*launcher, str(ROOT / "examples/huggingface_llama.py")], capture_output=True, text=True, timeout=280
        )
        assert done.returncode == 0, done.stderr
        return [line for line in done.stdout.splitlines() if line.startswith("step")]

    one, two = losses(1), losses(2)
    first, last = (float(one[index].split()[-1]) for index in (0, -1))
    assert len(one) == 20 and last < first - 1
    for a, b in zip(one, two, strict=True):
        assert abs(float(a.split()[-1]) - float(b.split()[-1])) < 1e-3
