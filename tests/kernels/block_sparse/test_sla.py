"""What a selection leaves out: the difference of two sums against the sum itself, and 0 where that is nothing."""

import pytest
import torch

from longctx.kernels.block_sparse.routing.sla import FEATURE_MAPS, features, left_out, rest_of, with_ones


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def sums(phi_q: torch.Tensor, phi_k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    return torch.einsum("bqhd,bkhd,qk,bkhe->bqhe", phi_q, phi_k, seen.to(v.dtype), with_ones(v))


@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_features_are_positive_and_wide(name):
    x = draw(2, 5, 3, 8)
    want = torch.softmax(x, -1) if name == "softmax" else torch.where(x > 0, x + 1, x.exp())
    assert (features(x, name) - want).abs().max() < 1e-12 and (want > 0).all()
    assert features(x.bfloat16(), name).dtype == with_ones(x.bfloat16()).dtype == torch.float32


def test_the_rest_is_a_mean_of_what_is_left_out():
    q, k, v = (draw(1, 6, 2, 4, seed=seed).requires_grad_() for seed in range(3))
    every = torch.ones(6, 6, dtype=torch.bool).tril()
    selected = every & (draw(6, 6, seed=5) > 0)
    some = (every & ~selected).any(-1)
    assert some.any() and not some.all()
    phi_q, phi_k = features(q, "softmax"), features(k, "softmax")
    got = rest_of(sums(phi_q, phi_k, v, every), sums(phi_q, phi_k, v, selected), some[None, :, None].expand(1, 6, 2))
    weights = torch.einsum("bqhd,bkhd,qk->bqhk", phi_q, phi_k, (every & ~selected).double())
    weights = weights / torch.where(some[None, :, None, None], weights.sum(-1, keepdim=True), 1.0)
    want = torch.einsum("bqhk,bkhe->bqhe", weights, v)
    assert (got - want).abs().max() < 1e-12
    assert (got[:, ~some] == 0).all()
    dout = draw(*got.shape, seed=6)
    grads = (torch.autograd.grad(out, (q, k, v), dout, retain_graph=True) for out in (got, want))
    for ours, true in zip(*grads, strict=True):
        assert (ours - true).abs().max() < 1e-12


@pytest.mark.parametrize("size", [0.0, 1.0, 1e30])
def test_noise_stays_noise(size):
    every = (size * with_ones(draw(1, 9, 2, 4))).float()
    every[..., -1] = size
    selected = every.clone().requires_grad_()
    noisy = selected * (1 + 3e-8 * draw(1, 9, 2, 5, seed=3).float())
    got = rest_of(every, noisy, torch.ones(1, 9, 2, dtype=torch.bool))
    assert got.isfinite().all() and got.abs().max() < 20
    nothing = rest_of(every, noisy, torch.zeros(1, 9, 2, dtype=torch.bool))
    assert (nothing == 0).all()
    (grad,) = torch.autograd.grad(nothing.sum(), selected)
    assert (grad == 0).all()


def test_left_out_counts_blocks_not_values():
    first = torch.tensor([[0, 0, 0, 0, 0, 0, 6, 6, 6, 6, 6, 6, 12]])  # blocks of 4: the second one is shared
    picks = torch.full((1, 13, 1, 2), -1)
    picks[0, 4:, 0, 0] = 0
    got = left_out(picks, block_size=4, positions=torch.arange(13), first=first)[0, :, 0]
    before = [0, 0, 0, 0, 1, 1, 0, 0, 1, 1, 1, 1, 0]
    assert got.tolist() == [count > (token >= 4) for token, count in enumerate(before)]
