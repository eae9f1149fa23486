"""The merge is a commutative monoid with identity (0, -inf), safe at every gap of lse."""

import math
from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.kernels.merge import Partial, empty_partial, merge, merge_into

DTYPES = [torch.float32, torch.float64]
# A partial per query: its lse, often far from the others' or absent, and its out.
lses = st.one_of(st.just(-math.inf), st.floats(-3.0, 3.0), st.floats(-1e4, 1e4), st.sampled_from([-1e4, 1e4]))
outs = st.floats(-8.0, 8.0, width=16)
rows = st.tuples(lses, outs)
queries = st.lists(rows, min_size=3, max_size=3)


def partial(queries: list[tuple[float, float]], dtype: torch.dtype = torch.float64) -> Partial:
    """Return `[1, T, 1, 1]` partials; a query that saw no key has out 0."""
    lse = torch.tensor([[[lse for lse, _ in queries]]], dtype=dtype)
    out = torch.tensor([[[[0.0 if math.isinf(lse) else out]] for lse, out in queries]], dtype=dtype)
    return Partial(out, lse)


def nothing(dtype: torch.dtype = torch.float64) -> Partial:
    return empty_partial(torch.empty(1, 3, 1, 1, dtype=dtype), v_head_dim=1)


def assert_close(a: Partial, b: Partial, *, steps: float = 4.0) -> None:
    """Compare to a few rounding steps of lse, and of out at its values' size times lse's: weights carry lse's."""
    assert not any(x.isnan().any() for x in (a.out, a.lse, b.out, b.lse))
    assert torch.equal(torch.isneginf(a.lse), torch.isneginf(b.lse))
    size = b.lse.abs().nan_to_num(posinf=0.0).clamp_min(1.0)
    eps = torch.finfo(a.lse.dtype).eps
    assert ((a.lse - b.lse).nan_to_num().abs() <= steps * eps * size).all()
    # A rounding step of lse moves a weight by as much: out of at most 8 by at most 8 times that.
    assert ((a.out - b.out).abs() <= 8 * steps * eps * size.transpose(1, 2).unsqueeze(-1)).all()


def exact(parts: list[Partial]) -> Partial:
    """Merge all at once in float64, by softmax over the parts."""
    lse = torch.stack([p.lse.double() for p in parts])
    blind = torch.isneginf(lse).all(0)
    weights = torch.softmax(lse.masked_fill(blind, 0.0), 0).masked_fill(blind, 0.0)
    out = sum(w.transpose(1, 2).unsqueeze(-1) * p.out.double() for w, p in zip(weights, parts, strict=True))
    return Partial(out, torch.logsumexp(lse, 0))


@pytest.mark.parametrize("dtype", DTYPES)
@given(a=queries, b=queries)
def test_commutative(dtype, a, b):
    assert_close(merge(partial(a, dtype), partial(b, dtype)), merge(partial(b, dtype), partial(a, dtype)))


@pytest.mark.parametrize("dtype", DTYPES)
@given(a=queries, b=queries, c=queries)
def test_associative(dtype, a, b, c):
    x, y, z = (partial(queries, dtype) for queries in (a, b, c))
    assert_close(merge(merge(x, y), z), merge(x, merge(y, z)))


@pytest.mark.parametrize("dtype", DTYPES)
@given(a=queries)
def test_identity_on_either_side_is_exact(dtype, a):
    x = partial(a, dtype)
    for merged in (merge(nothing(dtype), x), merge(x, nothing(dtype))):
        assert torch.equal(merged.out, x.out) and torch.equal(merged.lse, x.lse)


@pytest.mark.parametrize("dtype", DTYPES)
@given(gap=st.floats(-1e4, 1e4), base=st.floats(-100.0, 100.0), out=st.tuples(outs, outs))
def test_any_gap_of_lse_is_finite_and_right(dtype, gap, base, out):
    a, b = (partial([(lse, o)] * 3, dtype) for lse, o in ((base, out[0]), (base + gap, out[1])))
    merged = merge(a, b)
    assert torch.isfinite(merged.out).all() and torch.isfinite(merged.lse).all()
    truth = exact([a, b])
    assert_close(merged, Partial(truth.out.to(dtype), truth.lse.to(dtype)))


@pytest.mark.parametrize("dtype", DTYPES)
@given(hops=st.lists(queries, min_size=5, max_size=5))
@settings(max_examples=25, deadline=None)
def test_all_orders_of_five_hops_agree_and_none_is_nan(dtype, hops):
    parts = [partial(queries, dtype) for queries in hops]
    truth = exact(parts)
    want = Partial(truth.out.to(dtype), truth.lse.to(dtype))
    for order in permutations(parts):
        total = nothing(dtype)
        for part in order:
            merge_into(total, part.out, part.lse)
        assert_close(total, want, steps=8.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_batch_row_head_and_query_has_its_own_weight(dtype):
    generator = torch.Generator().manual_seed(0)
    parts = []
    for _ in range(3):
        out = torch.randn(2, 5, 3, 4, generator=generator, dtype=torch.float64).to(dtype)
        parts.append(Partial(out, (torch.randn(2, 3, 5, generator=generator, dtype=torch.float64) * 3).to(dtype)))
    truth = exact(parts)
    want = Partial(truth.out.to(dtype), truth.lse.to(dtype))
    assert_close(merge(merge(parts[0], parts[1]), parts[2]), want)


def test_rows_with_and_without_keys_in_one_tensor():
    a = partial([(-math.inf, 0.0), (1.0, 2.0), (-math.inf, 0.0)])
    b = partial([(3.0, 4.0), (-math.inf, 0.0), (-math.inf, 0.0)])
    merged = merge(a, b)
    assert merged.out.flatten().tolist() == [4.0, 2.0, 0.0]
    assert merged.lse.flatten().tolist() == [3.0, 1.0, -math.inf]


def test_merging_low_precision_keeps_the_accumulator_wide():
    a = partial([(0.0, 1.0), (1.0, 2.0), (2.0, 3.0)], torch.float32)
    merge_into(a, torch.ones(1, 3, 1, 1, dtype=torch.bfloat16), torch.zeros(1, 1, 3))
    assert a.out.dtype == torch.float32 and a.lse.dtype == torch.float32
