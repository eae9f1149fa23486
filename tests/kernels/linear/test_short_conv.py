"""The short causal convolution, against a loop over tokens and taps and against `conv1d`."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from longctx.kernels.linear import short_conv as module
from longctx.kernels.linear.short_conv import short_conv
from tests.support.tolerance import GRADIENT_FACTOR, assert_within_budget

LENGTHS = {
    "one": (13,),
    "single token": (1,),
    "single tokens": (1,) * 9,
    "two and a rest": (4, 4, 4, 1),
    "longer than a block": (23, 23, 2, 11),
}


def by_hand(extended: Tensor, weight: Tensor, lengths: tuple[int, ...], documents: Tensor | None) -> Tensor:
    """Return the sum of the taps token by token; differentiable."""
    taps, outs, source = weight.shape[1], [], 0
    for length in lengths:
        for t in range(source + taps - 1, source + taps - 1 + length):
            y = torch.zeros_like(extended[:, 0])
            for j in range(taps):
                at = t - (taps - 1) + j
                same = torch.ones(1, 1, dtype=torch.bool)
                if documents is not None:
                    same = (documents[:, at] == documents[:, t])[:, None]
                y = y + torch.where(same, weight[:, j] * extended[:, at], 0.0)
            outs.append(y)
        source += length + taps - 1
    return torch.stack(outs, dim=1)


def case(lengths: tuple[int, ...], taps: int, rows: int | None, dtype: torch.dtype = torch.float64):
    """Return extended tokens of two sequences and five channels, weights, documents of about three tokens."""
    torch.manual_seed(0)
    size = sum(lengths) + len(lengths) * (taps - 1)
    documents = None if rows is None else (torch.rand(rows, size) < 0.3).cumsum(1).int()
    x = torch.randn(2, size, 5, dtype=dtype, requires_grad=True)
    return x, torch.randn(5, taps, dtype=dtype, requires_grad=True), documents


def both(out: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    """Return the output and the gradients of a loss on it that weighs every element differently."""
    weights = torch.linspace(-1, 2, out.numel(), dtype=torch.float64).view_as(out)
    return out, *torch.autograd.grad((out.double() * weights).sum(), leaves)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("taps", [1, 3, 4])
@pytest.mark.parametrize("rows", [None, 1, 2], ids=["one document", "the same documents", "documents per row"])
def test_equals_the_loop(lengths, taps, rows, monkeypatch):
    monkeypatch.setattr(module, "CPU_BLOCK", 8)
    x, weight, documents = case(lengths, taps, rows)
    ours = both(short_conv(x, weight, lengths=lengths, documents=documents), x, weight)
    ref = both(by_hand(x, weight, lengths, documents), x, weight)
    for a, b in zip(ours, ref, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_gradients_by_finite_differences():
    x, weight, documents = case((5, 5, 2), 3, 2)
    assert torch.autograd.gradcheck(
        lambda x, w: short_conv(x, w, lengths=(5, 5, 2), documents=documents), (x, weight), atol=1e-8
    )


def test_tap_order_is_that_of_conv1d():
    x, weight, _ = case((300,), 4, None)
    expected = F.conv1d(x.mT, weight[:, None], groups=5).mT
    torch.testing.assert_close(short_conv(x, weight, lengths=(300,), documents=None), expected, rtol=0, atol=1e-12)


def test_nothing_of_another_document_comes_in_not_even_infinity():
    x, weight, _ = case((6,), 4, None)
    documents = torch.tensor([[3, 3, 3, 3, 3, 4, 4, 4, 4]])
    spoiled = x.detach().clone()
    spoiled[:, :5] = torch.inf
    out = short_conv(spoiled.requires_grad_(), weight, lengths=(6,), documents=documents)
    expected = short_conv(x, weight, lengths=(6,), documents=documents)
    assert torch.equal(out[:, 2:], expected[:, 2:])
    (dx,) = torch.autograd.grad(out[:, 2:].sum(), spoiled)
    assert torch.equal(dx[:, :5], torch.zeros_like(dx[:, :5]))
    assert torch.isfinite(dx).all()


def test_bfloat16_is_within_the_budget_of_torch():
    x, weight, documents = case((40, 40, 7), 4, 1, torch.bfloat16)
    ours = both(short_conv(x, weight, lengths=(40, 40, 7), documents=documents), x, weight)
    assert ours[0].dtype == ours[1].dtype == ours[2].dtype == torch.bfloat16
    torchs = both(by_hand(x, weight, (40, 40, 7), documents), x, weight)
    wide = [leaf.detach().double().requires_grad_() for leaf in (x, weight)]
    ref = both(by_hand(*wide, (40, 40, 7), documents), *wide)
    for a, b, c, name in zip(ours, torchs, ref, ("out", "dx", "dweight"), strict=True):
        assert_within_budget(a, b, c, factor=2.0 if name == "out" else GRADIENT_FACTOR, name=name)


def test_weights_of_another_dtype_keep_it():
    x, weight, _ = case((6,), 3, None, torch.bfloat16)
    master = weight.detach().float().requires_grad_()
    out = short_conv(x, master, lengths=(6,), documents=None)
    (dweight,) = torch.autograd.grad(out.float().sum(), master)
    assert out.dtype == torch.bfloat16
    assert dweight.dtype == torch.float32


def test_autograd_keeps_the_inputs_only():
    kept: list[int] = []
    x, weight, _ = case((500,), 4, None)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        short_conv(x, weight, lengths=(500,), documents=None)
    assert sorted(kept) == [weight.numel(), x.numel()]


@pytest.mark.parametrize(
    ("shape", "weight", "documents", "message"),
    [
        ((2, 8, 5), (4, 3), None, "need weights"),
        ((2, 8, 5), (5,), None, "need weights"),
        ((2, 7, 5), (5, 3), None, "need 8 tokens; given 7"),
        ((2, 8, 5), (5, 3), (1, 6), r"documents must be \[1, 8\]"),
    ],
)
def test_what_does_not_fit_is_refused(shape, weight, documents, message):
    numbers = None if documents is None else torch.zeros(documents)
    with pytest.raises(ValueError, match=message):
        short_conv(torch.zeros(shape), torch.zeros(weight), lengths=(6,), documents=numbers)
