"""Gates by hand, in at least float32; the norms of heads; what linear layers begin with."""

import math

import pytest
import torch
import torch.nn.functional as F

from longctx.mixers.transition import DECAYS, Transition, fixed_decay
from longctx.model import ModelConfig, initial_weight
from longctx.norms import HEAD_NORMS, head_norm

DIM, HEADS, KEYS = 6, 2, 4


def transition(decay: str, *, rule: str = "sum", layer: int = 1, num_layers: int = 3) -> Transition:
    torch.manual_seed(3)
    made = Transition(
        decay=decay, rule=rule, dim=DIM, heads=HEADS, key_dim=KEYS, layer=layer, num_layers=num_layers
    ).double()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made


def tokens() -> torch.Tensor:
    return torch.randn(2, 5, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("decay", "layer", "values"),
    [
        ("lightning", 0, [-(2**-4) * 1.00001, -(2**-8) * 1.00001]),
        ("lightning", 2, [-(2**-4) * 1e-5, -(2**-8) * 1e-5]),
        ("transnormer", 0, [0.0, -4.0]),
        ("transnormer", 2, [0.0, -4.0 / 3]),
        ("retention", 2, [math.log(31 / 32), math.log(63 / 64)]),
    ],
)
def test_fixed_decays(decay, layer, values):
    got = transition(decay, layer=layer)(tokens()).g
    assert got.tolist() == pytest.approx(values, rel=1e-12)


def test_a_model_of_one_layer_has_decays_too():
    assert fixed_decay("lightning", 2, 0, 1, torch.float64, torch.device("cpu")).lt(0).all()


def test_mamba2():
    made, x = transition("mamba2"), tokens()
    want = -made.A_log.exp() * torch.log1p(torch.exp(x @ made.a_proj.weight.T + made.dt_bias))
    assert (made(x).g - want).abs().max() < 1e-12 and want.shape == (2, 5, HEADS)


def test_decays_of_each_key_dim():
    x = tokens()
    for name in ("gla", "regla", "kda"):
        made = transition(name)
        low = x @ made.down.weight.T
        raw = low @ made.up.weight.T
        if name == "kda":
            rate = torch.log1p(torch.exp(raw + made.dt_bias)).reshape(2, 5, HEADS, KEYS)
            want = -made.A_log.exp()[:, None] * rate
        else:
            f = torch.sigmoid(raw + made.up.bias)
            if name == "regla":
                r = torch.sigmoid(low @ made.refine.weight.T + made.refine.bias)
                f = (1 - r) * f**2 + r * (1 - (1 - f) ** 2)
            want = (f.log() / 16).reshape(2, 5, HEADS, KEYS)
        assert (made(x).g - want).abs().max() < 1e-12, name


def test_beta():
    made, x = transition("none", rule="delta"), tokens()
    gates = made(x)
    assert gates.g is None and (gates.beta - torch.sigmoid(x @ made.b_proj.weight.T)).abs().max() < 1e-12
    assert transition("none")(x) == (None, None)


@pytest.mark.parametrize("decay", [name for name in DECAYS if name != "none"])
def test_decays_of_16_bit_tokens_are_float32_and_stay_finite(decay):
    made = transition(decay, rule="delta").float()
    for size in (1.0, 1e4, -1e4):
        x = (tokens() * size).bfloat16().requires_grad_()
        gates = made(x)
        assert gates.g.dtype == gates.beta.dtype == torch.float32
        assert gates.g.isfinite().all() and gates.g.le(0).all()
        if gates.g.requires_grad:
            gates.g.sum().backward()
            assert x.grad.isfinite().all()


def test_head_norms():
    x = tokens() * 3 + 1
    rms = x / x.square().mean(-1, keepdim=True).sqrt()
    want = {"none": x, "rms": rms, "simple_rms": rms, "layer": F.layer_norm(x, (DIM,), eps=1e-12)}
    assert set(want) == set(HEAD_NORMS)
    for name, value in want.items():
        norm = head_norm(name, DIM, eps=1e-12).double()
        assert (norm(x) - value).abs().max() < 1e-9, name
        assert bool(list(norm.parameters())) == (name in ("rms", "layer"))
        low = head_norm(name, DIM, eps=1e-12).bfloat16()(x.bfloat16())
        assert low.dtype == torch.bfloat16 and (low.double() - value).abs().max() < 0.03 * value.abs().max()


def test_what_linear_layers_begin_with():
    config = ModelConfig(vocab_size=19, dim=16, num_layers=2, num_heads=2, num_kv_heads=2)

    def initial(name: str, *shape: int) -> torch.Tensor:
        return initial_weight(f"blocks.0.attention.{name}", torch.Size(shape), config=config, seed=1)

    rates, steps = initial("transition.A_log", 500).exp(), F.softplus(initial("transition.dt_bias", 500))
    assert 1 <= rates.min() < 2 and 15 < rates.max() <= 16
    assert 1e-3 * 0.999 <= steps.min() < 2e-3 and 0.08 < steps.max() <= 0.1 * 1.001
    assert 0.45 < initial("conv_weight", 500, 4).abs().max() <= 0.5
    assert torch.equal(initial("feature_map.query_weight", 2, 3, 3), torch.eye(3).expand(2, 3, 3))
    assert not initial("transition.up.bias", 7).any() and initial("norm.weight", 7).eq(1).all()
    assert torch.equal(initial("transition.A_log", 9), initial("transition.A_log", 9))
    assert not torch.equal(initial("transition.A_log", 9), initial("transition.dt_bias", 9))
