"""The yardstick itself, by other means: torch's own attention, finite differences, sinks as an extra key."""

import math

import torch

from longctx.kernels.softmax.reference import dense_attention

T, H, HK, D, DV = 9, 4, 2, 5, 3


def tensors() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(2, T, H, D), (2, T, HK, D), (2, T, HK, DV)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def lower() -> torch.Tensor:
    return torch.ones(T, T, dtype=torch.bool).tril()


def test_equals_torchs_attention():
    q, k, v = tensors()
    out, _ = dense_attention(q, k, v, allowed=lower())
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    want = torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)
    assert (out - want.transpose(1, 2)).abs().max() < 1e-14


def test_a_mask_per_head_is_each_heads_own_attention():
    q, k, v = tensors()
    masks = torch.stack([lower().triu(-h) for h in range(H)])
    masks[2, 4] = False
    out, lse = dense_attention(q, k, v, allowed=masks)
    for h in range(H):
        head = slice(h, h + 1)
        kv = slice(h // 2, h // 2 + 1)
        want = dense_attention(q[:, :, head], k[:, :, kv], v[:, :, kv], allowed=masks[h])
        # To rounding: products of other shapes add in another order on some CPUs.
        torch.testing.assert_close(out[:, :, head], want[0], rtol=0, atol=1e-14)
        torch.testing.assert_close(lse[:, head], want[1], rtol=0, atol=1e-14)


def test_the_softcap_caps_and_vanishes_when_large():
    q, k, v = tensors()
    got, _ = dense_attention(q, k, v, allowed=lower(), softcap=0.5)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(2, 2)) / math.sqrt(D)
    weights = torch.softmax((0.5 * (scores / 0.5).tanh()).masked_fill(~lower(), -math.inf), -1)
    want = torch.einsum("bhqk,bkhd->bqhd", weights, v.repeat_interleave(2, 2))
    assert (got - want).abs().max() < 1e-14
    plain, _ = dense_attention(q, k, v, allowed=lower())
    nearly, _ = dense_attention(q, k, v, allowed=lower(), softcap=1e6)
    assert (plain - nearly).abs().max() < 1e-10 < (plain - got).abs().max()


def test_a_sink_is_one_more_key_with_that_score_and_no_value():
    q, k, v = tensors()
    sinks = torch.tensor([0.5, -math.inf, 30.0, -2.0], dtype=torch.float64)
    out, lse = dense_attention(q, k, v, allowed=lower(), sink_logits=sinks)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(2, 2)) / math.sqrt(D)
    scores = scores.masked_fill(~lower(), -math.inf)
    scores = torch.cat([scores, sinks[:, None, None].expand(2, H, T, 1)], dim=-1)
    want = torch.einsum("bhqk,bkhd->bqhd", torch.softmax(scores, -1)[..., :-1], v.repeat_interleave(2, 2))
    assert (out - want).abs().max() < 1e-14
    assert (lse - torch.logsumexp(scores, -1)).abs().max() < 1e-14


def test_blind_rows_are_zero_and_their_lse_is_the_sinks():
    q, k, v = tensors()
    blind = lower()
    blind[3] = False
    for sinks in (None, torch.tensor([0.5, 1.0, 2.0, -2.0], dtype=torch.float64).requires_grad_()):
        out, lse = dense_attention(q, k, v, allowed=blind, sink_logits=sinks)
        assert (out[:, 3] == 0).all()
        assert torch.isneginf(lse[:, :, 3]).all() if sinks is None else torch.equal(lse[0, :, 3], sinks)
        leaves = (q, k, v) if sinks is None else (q, k, v, sinks)
        grads = torch.autograd.grad(out.sum(), leaves)
        assert all(torch.isfinite(g).all() for g in grads)
        assert (grads[0][:, 3] == 0).all()


def test_gradients_are_those_of_finite_differences():
    sinks = torch.tensor([0.5, -1.0, 2.0, -2.0], dtype=torch.float64).requires_grad_()
    masks = torch.stack([lower().triu(-h) for h in range(H)])
    masks[1, 4] = False

    def attention(*args: torch.Tensor) -> torch.Tensor:
        q, k, v, logits = args
        return dense_attention(q, k, v, allowed=masks, softcap=1.5, sink_logits=logits)[0]

    assert torch.autograd.gradcheck(attention, (*tensors(), sinks))
