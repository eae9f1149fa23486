"""The decoder: shapes, initial weights from a name and a seed, and that it does not care who holds a token."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from longctx.config import load_config
from longctx.kernels.mask import causal
from longctx.kernels.softmax.reference import dense_attention
from longctx.loss import token_loss_sum
from longctx.model import Decoder, ModelConfig, everywhere, initial_weight, matmul_parameters
from longctx.norms import RMSNorm

SMALL = ModelConfig(vocab_size=19, dim=16, num_layers=2, num_heads=4, num_kv_heads=2, hidden_dim=24)


def build(config: ModelConfig) -> Decoder:
    model = Decoder(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial_weight(name, parameter.shape, config=config, seed=0))
    return model.double()


def run(model, tokens, *, positions, attend):
    return model(tokens, places=everywhere(model.config, positions=positions, attend=attend))


def causal_attention(q, k, v, *, sink_logits=None):
    assert sink_logits is None
    out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=True)
    return out.transpose(1, 2)


@pytest.mark.parametrize(("name", "parameters"), [("llama3_8b", 8_030_261_248), ("qwen3_8b", 8_190_735_360)])
def test_published_shapes_build_on_the_meta_device(name, parameters):
    config = load_config([f"model={name}"]).model
    with torch.device("meta"):
        model = Decoder(config)
    assert sum(p.numel() for p in model.parameters()) == parameters
    norms = sum(p.numel() for p in model.parameters() if p.ndim == 1)
    assert matmul_parameters(config) == parameters - norms - model.embedding.weight.numel()


@pytest.mark.parametrize("qk_norm", ["none", "head"])
@pytest.mark.parametrize("tie", [False, True])
def test_gradients_reach_every_parameter(qk_norm, tie):
    model = build(dataclasses.replace(SMALL, qk_norm=qk_norm, tie_embeddings=tie))
    tokens = torch.arange(10)[None] % 19
    logits = run(model, tokens, positions=torch.arange(10), attend=causal_attention)
    assert logits.shape == (1, 10, 19)
    token_loss_sum(logits, tokens.roll(-1, 1)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    assert (model.output.weight is model.embedding.weight) == tie
    assert any("q_norm" in name for name, _ in model.named_parameters()) == (qk_norm == "head")


def test_tokens_may_come_in_any_order_with_their_positions():
    model = build(SMALL)
    tokens, order = torch.randint(19, (1, 12), generator=torch.Generator().manual_seed(1)), torch.randperm(12)
    inverse = torch.argsort(order)

    def shuffled(q, k, v, *, sink_logits=None):
        return causal_attention(q[:, inverse], k[:, inverse], v[:, inverse])[:, order]

    plain = run(model, tokens, positions=torch.arange(12), attend=causal_attention)
    moved = run(model, tokens[:, order], positions=order, attend=shuffled)
    assert (moved[:, inverse] - plain).abs().max() < 1e-12


def test_initial_weights_depend_on_name_and_seed_alone():
    shape = torch.Size([8, 16])

    def weight(name: str, seed: int) -> torch.Tensor:
        return initial_weight(name, shape, config=SMALL, seed=seed)

    torch.manual_seed(5)
    assert torch.equal(weight("a.weight", 1), weight("a.weight", 1))
    assert not torch.equal(weight("a.weight", 1), weight("a.weight", 2))
    assert not torch.equal(weight("a.weight", 1), weight("b.weight", 1))
    big = initial_weight("blocks.0.mlp.down_proj.weight", torch.Size([400, 400]), config=SMALL, seed=1)
    assert big.std().item() == pytest.approx(0.02 / (2 * 2) ** 0.5, rel=0.02)


def test_rmsnorm_of_sixteen_bits_is_computed_in_float32():
    norm = RMSNorm(64, eps=1e-6)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)) * 300  # squares overflow nothing in float32
    want = x.double() / x.double().square().mean(-1, keepdim=True).sqrt()
    got = norm.to(torch.bfloat16)(x.bfloat16())
    assert got.dtype == torch.bfloat16 and (got.double() - want).abs().max() < 0.03


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_kv_heads": 3}, "model.num_heads=4 must be a multiple of model.num_kv_heads=3"),
        ({"dim": 18}, "model.dim=18 is not a multiple of model.num_heads=4; set model.head_dim"),
        ({"head_dim": 7}, "even head size; given 7"),
        ({"qk_norm": "layer"}, "model.qk_norm=layer is not known; known are none, head"),
        ({"num_layers": 0}, "model.num_layers must be >= 1; given 0"),
        ({"vocab_size": 1}, "model.vocab_size must be >= 2 or null; given 1"),
        ({"rope_theta": 0.0}, "model.rope_theta must be > 0"),
    ],
)
def test_bad_shapes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        validate(dataclasses.replace(SMALL, **change))


def validate(shape):
    shape.validate()
    shape.validate_attention(rope=True)


def test_the_loss_is_a_sum_over_what_counts():
    logits = torch.randn(2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    labels = torch.tensor([[1, -100, 4], [-100, -100, 0]])
    want = -(logits.log_softmax(-1)[0, 0, 1] + logits.log_softmax(-1)[0, 2, 4] + logits.log_softmax(-1)[1, 2, 0])
    assert abs(token_loss_sum(logits, labels) - want) < 1e-12


def test_a_shard_without_labels_has_loss_zero_and_gradient_zero():
    logits = torch.randn(1, 3, 5, requires_grad=True)
    loss = token_loss_sum(logits, torch.full((1, 3), -100))
    loss.backward()
    assert loss.item() == 0.0 and torch.equal(logits.grad, torch.zeros(1, 3, 5))


def test_sink_logits_start_at_zero_and_learn():
    model = build(dataclasses.replace(SMALL, sink_logits=True))
    tokens, positions = torch.arange(10)[None] % 19, torch.arange(10)

    def attend(q, k, v, *, sink_logits):
        assert sink_logits.shape == (4,) and not sink_logits.any()
        allowed = causal().allowed(positions, positions)
        return dense_attention(q, k, v, allowed=allowed, sink_logits=sink_logits)[0]

    token_loss_sum(run(model, tokens, positions=positions, attend=attend), tokens.roll(-1, 1)).backward()
    for block in model.blocks:
        assert block.attention.sink_logits.grad.abs().min() > 0
