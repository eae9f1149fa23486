"""The native engine: what each dtype is computed in, and what a step reports."""

import dataclasses

import pytest
import torch

from longctx.attention_config import AttentionConfig
from longctx.batch import shard_samples
from longctx.data.stream import Sample
from longctx.engines.build import build_engine
from longctx.engines.engine import EngineConfig
from longctx.mixers.layers import Layers
from longctx.model import ModelConfig
from longctx.optim import OptimConfig
from longctx.parallel.mesh import Degrees
from longctx.parallel.transport import ProcessGroupTransport
from longctx.stack import build_stack

MODEL = ModelConfig(vocab_size=19, dim=16, num_layers=1, num_heads=2, num_kv_heads=1, hidden_dim=24)


def build(group, world_size: int, dtype: str, layers: str | None = None):
    config = AttentionConfig(layers=layers)
    stack = build_stack(
        config,
        layers=Layers(kinds=config.kinds(1)),
        model=MODEL,
        total=12,
        dtype=torch.float32,
        transport=ProcessGroupTransport(group),
        per_machine=world_size,
    )
    engine = build_engine(
        EngineConfig(dtype=dtype, parameters="shard"),
        optim=OptimConfig(),
        stack=stack,
        degrees=Degrees(1, 1, world_size),
        device=torch.device("cpu"),
        seed=0,
    )
    tokens = torch.arange(12).numpy() % 19
    labels = tokens.copy()
    labels[[3, 11]] = -100
    sample = Sample(tokens=tokens, labels=labels, cu_seqlens=(0, 4, 12))
    return engine, shard_samples([sample], stack=stack, device=torch.device("cpu"))


def observe(rank: int, world_size: int, group, dtype: str):
    """Return the dtypes that a block and its attention see, and those of parameters and optimizer state."""
    engine, batch = build(group, world_size, dtype)
    seen = {}

    def block(module, args, kwargs):
        seen["x"], seen["cos"] = args[0].dtype, kwargs["rope"][0].dtype
        seen["weight"] = module.mlp.up_proj.weight.dtype

    engine.model.blocks[0].register_forward_pre_hook(block, with_kwargs=True)
    result = engine.train_step([batch], lr=1e-3)
    parameter = next(engine.model.parameters())
    seen["parameter"], seen["moment"] = parameter.dtype, engine.optimizer.state[parameter]["exp_avg"].dtype
    return seen, dataclasses.asdict(result)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_dtypes(gloo_pool, dtype):
    arithmetic = getattr(torch, dtype)
    wide = torch.float64 if dtype == "float64" else torch.float32
    for seen, result in gloo_pool.run(observe, 2, dtype):
        assert seen["x"] == arithmetic
        assert seen["weight"] in (arithmetic, wide)  # sharded parameters are wide until they are gathered
        assert seen["cos"] == seen["parameter"] == seen["moment"] == wide
        assert result["num_labels"] == 10 and result["visible_pairs"] == 10 + 36
        assert result["loss"] == pytest.approx(2.94, abs=0.1) and result["grad_norm"] > 0


def without_labels(rank: int, world_size: int, group):
    engine, batch = build(group, world_size, "float32")
    blank = dataclasses.replace(batch, labels=torch.full_like(batch.labels, -100), num_labels=0)
    return dataclasses.asdict(engine.train_step([blank], lr=1e-3)), engine.evaluate([blank])


def test_a_batch_without_any_label_is_a_loss_of_zero_and_not_nan(gloo_pool):
    for result, evaluated in gloo_pool.run(without_labels, 2):
        assert result["loss"] == 0.0 and result["grad_norm"] == 0.0 and evaluated == 0.0


def poison(rank: int, world_size: int, group):
    engine, batch = build(group, world_size, "float32")
    if rank == 1:
        next(engine.model.parameters()).detach().to_local().fill_(float("nan"))
    try:
        engine.train_step([batch], lr=1e-3)
    except FloatingPointError as error:
        return str(error)


def test_a_gradient_that_is_not_finite_stops_every_rank(gloo_pool):
    assert gloo_pool.run(poison, 2) == ["the gradient norm is nan; the last checkpoint is untouched"] * 2


def observe_gates(rank: int, world_size: int, group, kind: str, dtype: str):
    """Return the dtypes of what comes into a gate, its own weights, and what goes out of it, while it is computed."""
    engine, batch = build(group, world_size, dtype, layers=kind)
    seen = {}

    def gate(module, args, out):
        seen["x"], seen["g"] = args[0].dtype, out.g.dtype
        seen["weights"] = {parameter.dtype for parameter in module.parameters()}

    block = engine.model.blocks[0]
    block.attention.transition.register_forward_hook(gate)
    block.attention.register_forward_hook(lambda module, args, out: seen.update(q_proj=module.q_proj.weight.dtype))
    losses = [engine.train_step([batch], lr=1e-2).loss for _ in range(3)]
    return seen, losses


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
@pytest.mark.parametrize("kind", ["gdn", "gla"])
def test_gates_are_never_16_bit(gloo_pool, kind, dtype):
    arithmetic = getattr(torch, dtype)
    wide = torch.float64 if dtype == "float64" else torch.float32
    for seen, losses in gloo_pool.run(observe_gates, 2, kind, dtype):
        assert seen["x"] == seen["q_proj"] == arithmetic
        assert seen["g"] == wide and seen["weights"] == {wide}
        assert losses[2] < losses[0]
