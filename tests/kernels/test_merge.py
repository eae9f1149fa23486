"""The merge is a commutative monoid with identity (0, -inf), safe at every gap of lse."""

import math

import pytest
import torch

from longctx.kernels.merge import Partial, merge, merge_into


def random_partial(seed: int, shift: float = 0.0, dtype: torch.dtype = torch.float64) -> Partial:
    generator = torch.Generator().manual_seed(seed)
    out = torch.randn(2, 5, 3, 4, generator=generator, dtype=torch.float64)
    lse = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64) * 3 + shift
    return Partial(out.to(dtype), lse.to(dtype))


def identity() -> Partial:
    return Partial(torch.zeros(2, 5, 3, 4, dtype=torch.float64), torch.full((2, 3, 5), -math.inf, dtype=torch.float64))


def close(a: Partial, b: Partial, tolerance: float = 1e-13) -> bool:
    equal_infinities = torch.equal(torch.isneginf(a.lse), torch.isneginf(b.lse))
    lse = (a.lse - b.lse).nan_to_num().abs().max() < tolerance
    return equal_infinities and bool(lse) and bool((a.out - b.out).abs().max() < tolerance)


def test_associative_and_commutative():
    a, b, c = random_partial(1), random_partial(2, 20.0), random_partial(3, -20.0)
    assert close(merge(merge(a, b), c), merge(a, merge(b, c)))
    assert close(merge(a, b), merge(b, a))


def test_identity_on_either_side_is_exact():
    a = random_partial(4)
    for merged in (merge(identity(), a), merge(a, identity())):
        assert torch.equal(merged.out, a.out) and torch.equal(merged.lse, a.lse)
    nothing = merge(identity(), identity())
    assert torch.equal(nothing.out, identity().out) and torch.equal(nothing.lse, identity().lse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gap", [-1000.0, -100.0, -88.0, 0.0, 88.0, 100.0, 1000.0])
def test_any_gap_of_lse_is_finite_and_right(gap, dtype):
    a, b = random_partial(5, 0.0, dtype), random_partial(6, gap, dtype)
    merged = merge(a, b)
    wide = torch.stack([a.lse.double(), b.lse.double()])
    weights = torch.softmax(wide, dim=0).transpose(2, 3).unsqueeze(-1)
    want = weights[0] * a.out.double() + weights[1] * b.out.double()
    eps = torch.finfo(dtype).eps
    assert torch.isfinite(merged.out).all() and torch.isfinite(merged.lse).all()
    assert (merged.out - want).abs().max() < 20 * eps * (1 + abs(gap))
    assert (merged.lse - torch.logsumexp(wide, dim=0)).abs().max() < 20 * eps * (1 + abs(gap))


def test_rows_with_and_without_keys_in_one_tensor():
    a, b = random_partial(7), random_partial(8)
    a.lse[0, 0, 0] = -math.inf
    a.out[0, 0, 0] = 0
    b.lse[:, :, 1] = -math.inf
    b.out[:, 1] = 0
    merged = merge(a, b)
    assert torch.equal(merged.out[0, 0, 0], b.out[0, 0, 0])
    assert torch.equal(merged.out[:, 1], a.out[:, 1])
    assert not merged.out.isnan().any() and not merged.lse.isnan().any()


def test_merging_low_precision_keeps_the_accumulator_wide():
    a = random_partial(9, dtype=torch.float32)
    merge_into(a, torch.ones(2, 5, 3, 4, dtype=torch.bfloat16), torch.zeros(2, 3, 5))
    assert a.out.dtype == torch.float32 and a.lse.dtype == torch.float32
