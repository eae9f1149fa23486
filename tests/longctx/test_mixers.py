"""Every kind of layer over simulated ranks equals one rank: outputs, and all gradients summed over the ranks."""

import pytest
import torch

from longctx.attention_config import AttentionConfig
from longctx.batch import shard_samples
from longctx.data.stream import Sample
from longctx.loss import token_loss_sum
from longctx.mixers.layers import Layers
from longctx.mixers.pattern import LINEAR_KINDS
from longctx.model import Decoder, ModelConfig, initial_weight
from longctx.parallel.loopback import run_ranks
from longctx.parallel.transport import Alone
from longctx.stack import Stack, build_stack

VOCABULARY, TOTAL = 23, 96
BOUNDS = ((0, 7, 8, 50, TOTAL), (0, 33, TOTAL))
LAYOUTS = {
    "contiguous": {"layout": "contiguous"},
    "zigzag": {"layout": "zigzag"},
    "stripes of 16": {"layout": "striped", "width": 16, "state_layout": "same"},
    "token stripes, relaid": {"layout": "striped"},
    "token stripes, relaid to zigzag": {"layout": "striped", "state_layout": "zigzag"},
}


def model_of(num_layers: int) -> ModelConfig:
    return ModelConfig(vocab_size=VOCABULARY, dim=16, num_layers=num_layers, num_heads=2, num_kv_heads=1, hidden_dim=24)


def samples() -> list[Sample]:
    generator = torch.Generator().manual_seed(4)
    made = []
    for bounds in BOUNDS:
        tokens = torch.randint(VOCABULARY, (TOTAL + 1,), generator=generator).numpy()
        labels = tokens[1:].copy()
        labels[[end - 1 for end in bounds[1:]]] = -100
        made.append(Sample(tokens=tokens[:-1].copy(), labels=labels, cu_seqlens=bounds))
    return made


def decoder(stack: Stack) -> Decoder:
    """Return a model in float64 whose every parameter matters."""
    model = Decoder(stack.model, stack.layers).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = initial_weight(name, parameter.shape, config=stack.model, seed=1).double()
            noise = torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(sum(map(ord, name))), dtype=torch.float64
            )
            parameter.copy_(value + noise * (0.3 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5))
    return model


def loss_and_gradients(transport, *, attention: AttentionConfig, layers: Layers, step: int = 0):
    """Return this rank's loss, logits at their positions, and every parameter's gradient."""
    stack = build_stack(
        attention,
        layers=layers,
        model=model_of(len(layers.kinds)),
        total=TOTAL,
        dtype=torch.float64,
        transport=transport,
        per_machine=transport.size,
    )
    model = decoder(stack)
    batch = shard_samples(samples(), stack=stack, device=torch.device("cpu"), step=step)
    logits = model(batch.tokens, places=stack.places(batch.plan))
    loss = token_loss_sum(logits, batch.labels)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    names = [name for name, _ in model.named_parameters()]
    return loss.detach(), logits.detach(), batch.plan.positions[stack.last], dict(zip(names, gradients, strict=True))


def assert_equal_to_one_rank(cp: int, *, attention: AttentionConfig, layers: Layers, step: int = 0) -> None:
    def work(transport):
        return loss_and_gradients(transport, attention=attention, layers=layers, step=step)

    want_loss, want_logits, _, want = work(Alone())
    ranks = run_ranks(cp, work)
    assert abs(sum(rank[0] for rank in ranks) - want_loss) <= 1e-10 * want_loss
    for _, logits, positions, _ in ranks:
        assert (logits - want_logits[:, positions]).abs().max() < 1e-10
    for name, gradient in want.items():
        got = sum(rank[3][name] for rank in ranks)
        assert gradient.abs().max() > 1e-8, f"{name} does not matter"
        assert (got - gradient).abs().max() <= 1e-10 * max(1.0, gradient.abs().max()), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", LINEAR_KINDS)
def test_every_kind_in_every_layout(kind, layout):
    attention = AttentionConfig(layers=f"{kind} + full", **LAYOUTS[layout])
    attention.validate()
    layers = Layers(kinds=attention.kinds(2), max_positions=TOTAL)
    assert_equal_to_one_rank(3, attention=attention, layers=layers)
