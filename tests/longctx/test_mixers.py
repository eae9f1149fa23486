"""Every kind of layer over simulated ranks equals one rank: outputs, and all gradients summed over the ranks."""

import dataclasses

import pytest
import torch

from longctx.attention_config import AttentionConfig
from longctx.batch import shard_samples
from longctx.data.stream import Sample
from longctx.kernels.linear.feature_maps import FEATURE_MAPS
from longctx.loss import token_loss_sum
from longctx.mixers.config import MixersConfig
from longctx.mixers.layers import Layers
from longctx.mixers.pattern import KINDS, LINEAR_KINDS, depth
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


def assert_equal_to_one_rank(cp: int, attention: AttentionConfig, layers: Layers, *, step: int = 0) -> None:
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


def settled(layers: str, mixers: MixersConfig | None = None, **given) -> tuple[AttentionConfig, Layers]:
    attention = AttentionConfig(layers=layers, **given)
    attention.validate()
    kinds = attention.kinds(depth(layers))
    mixers = mixers or MixersConfig()
    mixers.validate(kinds, head_dim=8)
    return attention, Layers(kinds=kinds, mixers=mixers, max_positions=TOTAL)


def changed(kind: str, **changes) -> MixersConfig:
    default = MixersConfig()
    return dataclasses.replace(default, **{kind: dataclasses.replace(getattr(default, kind), **changes)})


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", LINEAR_KINDS)
def test_every_kind_in_every_layout(kind, layout):
    assert_equal_to_one_rank(3, *settled(f"{kind} + full", **LAYOUTS[layout]))


@pytest.mark.parametrize("passing", ["ring", "log_depth", "pipelined"])
@pytest.mark.parametrize("cp", [2, 4])
def test_hybrids_under_every_state_passing(cp, passing):
    layers = "full + gdn + gla + full + lightning"
    assert_equal_to_one_rank(cp, *settled(layers, layout="zigzag", state_passing=passing))
    assert_equal_to_one_rank(cp, *settled(layers, layout="striped", state_passing=passing, documents=False))


@pytest.mark.parametrize(
    ("layers", "mixers", "given"),
    [
        *(("linear", changed("linear", feature_map=name), {}) for name in FEATURE_MAPS),
        ("linear + full", changed("linear", feature_map="performer", redraw_every=3), {}),
        ("gdn + full", changed("gdn", heads=3, head_dim=4, v_head_dim=6, conv=3, rope="all"), {}),
        ("kda + full", changed("full", rope=False, gate="sigmoid"), {}),
        ("window*2 + full + gdn", changed("window", gate="sigmoid"), {"window": 9, "sinks": 2}),
        ("gla + window", changed("gla", norm="layer", gate="linear"), {"head_windows": [5, None], "prefix": 4}),
        ("full + linear", changed("linear", kernel="reference"), {"chunk": 12}),
        ("full + linear", changed("linear", chunk_size=5), {}),
    ],
)
def test_settings(layers, mixers, given):
    assert_equal_to_one_rank(2, *settled(layers, mixers, layout="zigzag", **given), step=7)


def outputs(layers: Layers, attention: AttentionConfig, *, step: int = 0):
    return loss_and_gradients(Alone(), attention=attention, layers=layers, step=step)[1]


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("gdn", {"conv": 0}),
        ("gdn", {"conv": 3}),
        ("gdn", {"activation": "none"}),
        ("gdn", {"decay": "none"}),
        ("gdn", {"rule": "sum"}),
        ("gdn", {"norm": "layer"}),
        ("gdn", {"gate": "none"}),
        ("gdn", {"rope": "all"}),
        ("linear", {"feature_map": "relu"}),
        ("linear", {"feature_map": "performer"}),
        ("full", {"rope": False}),
        ("full", {"gate": "sigmoid"}),
    ],
)
def test_every_setting_matters(kind, changes):
    attention, layers = settled(kind)
    other = dataclasses.replace(layers, mixers=changed(kind, **changes))
    assert (outputs(other, attention) - outputs(layers, attention)).abs().max() > 1e-4


def test_random_features_change_with_the_seed_and_every_few_steps():
    attention, layers = settled("linear", changed("linear", feature_map="performer", redraw_every=3))
    at = [outputs(layers, attention, step=step) for step in (0, 2, 3)]
    assert torch.equal(at[0], at[1]) and not torch.equal(at[0], at[2])
    other = changed("linear", feature_map="performer", redraw_every=3, feature_seed=1)
    assert not torch.equal(at[0], outputs(dataclasses.replace(layers, mixers=other), attention))


def test_rope_in_the_first_layer_only():
    _, layers = settled("transnormer*3")
    model = Decoder(model_of(3), layers)
    assert [block.attention.rope_dim for block in model.blocks] == [8, None, None]


def test_documents_do_not_see_each_other_and_tokens_do_not_see_the_future():
    """In a stack of every kind: change a token, and exactly its successors in its document may move."""
    attention, layers = settled(" + ".join(LINEAR_KINDS), layout="contiguous")
    stack = build_stack(
        attention,
        layers=layers,
        model=model_of(len(LINEAR_KINDS)),
        total=TOTAL,
        dtype=torch.float64,
        transport=Alone(),
        per_machine=1,
    )
    model = decoder(stack)
    plan = stack.plan([BOUNDS[0]], total=TOTAL, device=torch.device("cpu"))
    tokens = torch.from_numpy(samples()[0].tokens)[None]
    changed_tokens = tokens.clone()
    changed_tokens[0, 20] = (tokens[0, 20] + 1) % VOCABULARY
    with torch.no_grad():
        before, after = (model(each, places=stack.places(plan))[0] for each in (tokens, changed_tokens))
    moved = (before != after).any(-1)
    assert moved[20:50].all() and not moved[:20].any() and not moved[50:].any()


@pytest.mark.parametrize("kind", KINDS)
def test_layers_begin_alike_without_a_trainer(kind):
    """No memory that nobody wrote to, and what only mixers have is distributed as a trainer's is."""
    layers = Layers(kinds=(kind,), max_positions=TOTAL)
    if kind == "linear":
        layers = dataclasses.replace(layers, mixers=changed("linear", feature_map="hedgehog", conv=3))
    config = dataclasses.replace(model_of(1), dim=64)
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # new memory is full of NaN
    try:
        assert torch.empty(3).isnan().all()
        model = Decoder(config, layers)
    finally:
        torch.use_deterministic_algorithms(deterministic)
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
        if name.endswith(("centroids", "gate_q", "gate_k", "conv_weight")):
            want = initial_weight(name, parameter.shape, config=config, seed=0)
            assert parameter.std().item() == pytest.approx(want.std().item(), rel=0.1), name
