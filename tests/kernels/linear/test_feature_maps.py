"""Feature maps against their papers' formulas, and attention through them against T x T weights."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from longctx.kernels.linear.feature_maps import FEATURE_MAPS, make_feature_map, normalised_attention
from longctx.kernels.linear.maps.base import FeatureMap
from longctx.kernels.linear.maps.performer import Performer, draw_directions
from longctx.kernels.linear.op import linear_attention
from tests.support.tolerance import assert_within_budget

D, H = 6, 2


def make(name: str, head_dim: int = D) -> FeatureMap:
    torch.manual_seed(5)
    made = make_feature_map(name, head_dim=head_dim, heads=H, max_positions=64, seed=3)
    for weight in made.parameters():  # away from the identity
        torch.nn.init.normal_(weight)
    return made


def tokens(count: int = 11, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, ...]:
    """Return q, k `[2, T, H, D]`, v `[2, T, H, 3]`, positions from 20 on."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, count, H, size, dtype=torch.float64, generator=generator) for size in (D, D, 3))
    q, k, v = (x.to(dtype).requires_grad_() for x in (q, k, v))
    return q, k, v, torch.arange(20, 20 + count)


FORMULAS = {
    "identity": lambda x, side: x,
    "silu": lambda x, side: x * torch.sigmoid(x),
    "l2": lambda x, side: x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt(),
    "elu1": lambda x, side: F.elu(x) + 1,
    "relu": lambda x, side: x.clamp(min=0),
    "softmax": lambda x, side: x.softmax(-1) if side == "q" else x.exp(),
}


@pytest.mark.parametrize("side", ["q", "k"])
@pytest.mark.parametrize("name", FORMULAS)
def test_formulas_without_weights(name, side):
    x, _, _, positions = tokens()
    torch.testing.assert_close(
        make(name)(x, positions=positions, side=side), FORMULAS[name](x, side), rtol=0, atol=1e-13
    )


@pytest.mark.parametrize("side", ["q", "k"])
@pytest.mark.parametrize("name", FORMULAS)
def test_bfloat16_is_within_the_budget_of_torch(name, side):
    x, _, _, positions = tokens(200, torch.bfloat16)
    ours = make(name)(x, positions=positions, side=side)
    assert ours.dtype == torch.bfloat16
    assert_within_budget(ours, FORMULAS[name](x, side), FORMULAS[name](x.double(), side))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_shapes_dtypes_and_finite_gradients(name, dtype):
    feature_map = make(name)
    for side in ("q", "k"):
        for size in (0.0, 1.0, 1e3):
            x = (tokens(dtype=dtype)[0].detach() * size).requires_grad_()
            out = feature_map(x, positions=torch.arange(11), side=side)
            assert out.shape == (2, 11, H, feature_map.features(D))
            assert out.dtype == dtype
            (dx,) = torch.autograd.grad(out.float().sum(), x)
            assert torch.isfinite(out).all()
            assert torch.isfinite(dx).all()


@pytest.mark.parametrize("side", ["q", "k"])
@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_a_token_alone_is_mapped_as_among_others(name, side):
    """Ranks hold different tokens: nothing may come from the others, nor from where a token is among them."""
    x, _, _, positions = tokens()
    feature_map = make(name)
    together = feature_map(x, positions=positions, side=side)
    for t in (0, 4, 10):
        alone = feature_map(x[:, t : t + 1] * 1.0, positions=positions[t : t + 1], side=side)
        torch.testing.assert_close(alone, together[:, t : t + 1], rtol=1e-13, atol=1e-13)


def mask(cu_seqlens: tuple[int, ...]) -> Tensor:
    documents = torch.tensor([sum(b <= t for b in cu_seqlens) for t in range(cu_seqlens[-1])])
    return torch.ones(cu_seqlens[-1], cu_seqlens[-1]).tril().bool() & (documents[:, None] == documents)


def dense(feature_map: FeatureMap, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, decays: Tensor) -> Tensor:
    """Return what the papers write with T x T weights, `decays` `[H, T, T]` of which are 0 where nothing is seen."""
    q, k = (feature_map(x, positions=positions, side=side) for x, side in ((q, "q"), (k, "k")))
    if feature_map.normaliser == "sum of each feature":
        over_tokens = torch.einsum("hts,bshf->bhtsf", decays, k)
        over_tokens = over_tokens / over_tokens.sum(3, keepdim=True)
        return torch.einsum("bthf,bhtsf,bshv->bthv", q, over_tokens, v)
    weights = torch.einsum("bthf,bshf->bhts", q, k) * decays
    if feature_map.normaliser == "sum":
        total = weights.sum(-1, keepdim=True)
        weights = torch.where(total == 0, 0.0, weights / torch.where(total == 0, 1.0, total))
    return torch.einsum("bhts,bshv->bthv", weights, v)


@pytest.mark.parametrize("bounds", [(0, 11), (0, 1, 4, 11)], ids=["one document", "packed"])
@pytest.mark.parametrize("gate", [None, (-0.3, 0.0)], ids=["no decay", "decay"])
@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_attention_equals_the_weights_written_out(name, gate, bounds):
    q, k, v, positions = tokens()
    feature_map = make(name).double()
    g = None if gate is None else torch.tensor(gate, dtype=torch.float64)
    distance = torch.arange(11)[:, None] - torch.arange(11)
    decays = torch.where(mask(bounds), torch.exp((torch.zeros(H) if g is None else g)[:, None, None] * distance), 0.0)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return linear_attention(q, k, v, g=g, scale=0.7, cu_seqlens=bounds, kernel="reference")[0]

    leaves = [q, k, v, *feature_map.parameters()]
    out = normalised_attention(feature_map, q, k, v, positions=positions, attention=attention)
    ref = dense(feature_map, q, k, v, positions, decays)
    if feature_map.normaliser == "none":
        ref = 0.7 * ref
    dout = torch.randn_like(out)
    ours, theirs = (torch.autograd.grad(y, leaves, dout) for y in (out, ref))
    for a, b in zip((out, *ours), (ref, *theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_the_last_token_of_softmax_is_the_paper_s():
    q, k, v, positions = tokens()
    out = normalised_attention(
        make("softmax"), q, k, v, positions=positions, attention=lambda q, k, v: linear_attention(q, k, v, scale=1.0)[0]
    )
    context = torch.einsum("bshf,bshv->bhfv", k.softmax(dim=1), v)
    expected = torch.einsum("bhf,bhfv->bhv", q[:, -1].softmax(-1), context)
    torch.testing.assert_close(out[:, -1], expected, rtol=0, atol=1e-12)


def test_tokens_whose_weights_are_all_zero_get_zero():
    q, k, v, positions = tokens()
    q = -q.detach().abs().requires_grad_()
    attention = lambda q, k, v: linear_attention(q, k, v, scale=1.0)[0]  # noqa: E731
    out = normalised_attention(make("relu"), q, k, v, positions=positions, attention=attention)
    assert torch.equal(out, torch.zeros_like(out))
    assert all(torch.isfinite(d).all() for d in torch.autograd.grad(out.sum(), (q, k, v)))


def test_elu1_keeps_what_a_sum_with_one_would_lose():
    x = torch.full((1, 1, 1, 1), -20.0)
    assert make("elu1")(x, positions=torch.arange(1), side="k").item() == torch.exp(torch.tensor(-20.0)).item() > 0
    assert (F.elu(x) + 1).item() == 0


def test_cosformer_weighs_by_the_distance():
    q, k, _, positions = tokens()
    feature_map = make_feature_map("cosformer", head_dim=D, heads=H, max_positions=31, seed=0)
    weights = torch.einsum(
        "bthf,bshf->bhts", *(feature_map(x, positions=positions, side=side) for x, side in ((q, "q"), (k, "k")))
    )
    cosine = torch.cos(math.pi / 2 * (positions[:, None] - positions) / 31)
    torch.testing.assert_close(weights, torch.einsum("bthf,bshf->bhts", q.relu(), k.relu()) * cosine)


def test_cosformer_refuses_positions_beyond_its_length():
    feature_map = make_feature_map("cosformer", head_dim=D, heads=H, max_positions=30, seed=0)
    with pytest.raises(ValueError, match="below max_positions = 30 only; given 30"):
        feature_map(tokens()[0], positions=torch.arange(20, 31), side="q")


def test_performer_is_an_unbiased_estimate_of_softmax_attention():
    q, k, _, positions = tokens(1)
    performer = Performer(head_dim=D, features=13, seed=1)
    estimates = []
    for epoch in range(800):
        performer.redraw(epoch)  # the side of keys has no free factor
        estimates.append(
            (performer(q, positions=positions, side="k") * performer(k, positions=positions, side="k")).sum(-1)
        )
    estimate, expected = torch.stack(estimates), torch.exp((q * k).sum(-1) / D**0.5)
    error = estimate.std(0) / len(estimates) ** 0.5
    assert ((estimate.mean(0) - expected).abs() < 4 * error).all()
    assert (error < 0.2 * expected).all()


def test_more_features_of_performer_come_closer_to_softmax():
    q, k, v, positions = tokens(40)
    q, k = 0.5 * q, 0.5 * k
    weights = torch.einsum("bthd,bshd->bhts", q, k) / D**0.5
    softmax = torch.einsum("bhts,bshv->bthv", weights.masked_fill(~mask((0, 40)), -torch.inf).softmax(-1), v)
    errors = []
    for count in (64, 1024, 16384):
        out = normalised_attention(
            Performer(head_dim=D, features=count, seed=0),
            q,
            k,
            v,
            positions=positions,
            attention=lambda q, k, v: linear_attention(q, k, v, scale=1.0)[0],
        )
        errors.append((out - softmax).square().mean().sqrt().item())
    assert errors[0] > 2 * errors[1] > 4 * errors[2]  # as 1 / sqrt m: four times each


def test_directions_are_orthogonal_in_groups():
    directions = draw_directions(2 * D + 1, D, seed=0, epoch=0)
    for group in (directions[:D], directions[D : 2 * D]):
        gram = group @ group.T
        torch.testing.assert_close(gram, torch.diag(gram.diagonal()))
    assert directions.shape == (2 * D + 1, D)
    assert (directions[:D] @ directions[D : 2 * D].T).abs().max() > 0.1


def test_directions_depend_on_seed_and_epoch_alone():
    first, second = Performer(head_dim=D, features=8, seed=1), Performer(head_dim=D, features=8, seed=1)
    before = torch.get_rng_state()
    cpu = torch.device("cpu")
    drawn = first.directions(cpu, torch.float64)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert torch.equal(second.directions(cpu, torch.float64), drawn)
    first.redraw(2)
    first.redraw(7)
    second.redraw(7)
    redrawn = first.directions(cpu, torch.float64)
    assert not torch.equal(redrawn, drawn)
    assert torch.equal(second.directions(cpu, torch.float64), redrawn)
    assert not torch.equal(Performer(head_dim=D, features=8, seed=2).directions(cpu, torch.float64), drawn)
    first.redraw(0)
    assert torch.equal(first.directions(cpu, torch.float64), drawn)


@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_built_on_the_meta_device(name):
    with torch.device("meta"):
        built = make_feature_map(name, head_dim=D, heads=H, max_positions=64, seed=3)
    built.to_empty(device="cpu")
    for module in built.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    here = make_feature_map(name, head_dim=D, heads=H, max_positions=64, seed=3)
    x, _, _, positions = tokens(dtype=torch.float32)
    for side in ("q", "k"):
        assert torch.equal(built(x, positions=positions, side=side), here(x, positions=positions, side=side))
    assert set(built.state_dict()) == ({"query_weight", "key_weight"} if name == "hedgehog" else set())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["softmax", "performer"])
def test_nothing_overflows(name, dtype):
    """Keys that hit the largest feature, a million of them; and keys that are hostile."""
    size = 256
    feature_map = make(name, size)
    x = torch.full((1, 3, 1, size), 1e4)
    if isinstance(feature_map, Performer):
        x[0, :2, 0] = feature_map.directions(torch.device("cpu"), torch.float32).T[:2] * size**0.5
    x = x.to(dtype).requires_grad_()
    mapped = feature_map(x, positions=torch.arange(3), side="k")
    state = 1e6 * mapped.float()
    assert torch.isfinite(state).all()
    assert state.max() > 1e15
    assert torch.isfinite(torch.autograd.grad(state.sum(), x)[0]).all()


def test_hedgehog_is_learned_per_head_and_side():
    q, k, _, positions = tokens(dtype=torch.float32)
    hedgehog = make("hedgehog")
    for side, weight, x in (("q", hedgehog.query_weight, q), ("k", hedgehog.key_weight, k)):
        out = hedgehog(x, positions=positions, side=side)
        for h in range(H):
            z = x[:, :, h] @ weight[h].T
            torch.testing.assert_close(out[:, :, h], torch.cat([z.softmax(-1), (-z).softmax(-1)], dim=-1))
        grads = torch.autograd.grad(out.square().sum(), [hedgehog.query_weight, hedgehog.key_weight], allow_unused=True)
        assert [grad is not None for grad in grads] == [side == "q", side == "k"]
    hedgehog.reset_parameters()
    assert torch.equal(hedgehog.key_weight.detach(), torch.eye(D).expand(H, D, D))


@pytest.mark.parametrize("name", ["softmax", "performer"])
def test_float16_is_refused_where_it_ends_too_early(name):
    with pytest.raises(ValueError, match="needs the range of bfloat16"):
        make(name)(tokens(dtype=torch.float16)[0], positions=torch.arange(11), side="k")


def test_unknown_names_and_options_are_refused():
    with pytest.raises(ValueError, match="'gelu' is not known; known are identity, silu"):
        make_feature_map("gelu", head_dim=D, heads=H, max_positions=4, seed=0)
    with pytest.raises(ValueError, match="null for other maps; given 8 for relu"):
        make_feature_map("relu", head_dim=D, heads=H, max_positions=4, seed=0, features=8)
    assert make_feature_map("performer", head_dim=D, heads=H, max_positions=4, seed=0, features=8).features(D) == 8
