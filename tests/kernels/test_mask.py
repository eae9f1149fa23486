"""The mask algebra against its definition."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longctx.kernels.mask import Mask, causal, documents, full, sliding_window

limits = st.one_of(st.none(), st.integers(0, 6))
bounds = st.one_of(st.none(), st.sets(st.integers(1, 11), max_size=4).map(lambda inner: (0, *sorted(inner), 12)))
masks = st.builds(Mask, left=limits, right=limits, cu_seqlens=bounds)
POSITIONS = torch.arange(12)


@given(masks, masks)
def test_and_lets_through_what_both_let_through(a, b):
    together = (a & b).allowed(POSITIONS, POSITIONS)
    assert torch.equal(together, a.allowed(POSITIONS, POSITIONS) & b.allowed(POSITIONS, POSITIONS))


@given(masks)
def test_allowed_is_the_definition(mask):
    def document(p):
        return sum(bound <= p for bound in mask.cu_seqlens) if mask.cu_seqlens else 0

    got = mask.allowed(POSITIONS, POSITIONS)
    for p in range(12):
        for k in range(12):
            seen = (mask.left is None or k >= p - mask.left) and (mask.right is None or k <= p + mask.right)
            assert got[p, k].item() == (seen and document(p) == document(k))


def test_names():
    assert full() == Mask()
    assert causal() == Mask(right=0)
    assert causal() & sliding_window(3) == Mask(left=3, right=0)
    assert documents((0, 4, 12)) & causal() == Mask(right=0, cu_seqlens=(0, 4, 12))


def test_bad_masks_are_refused():
    with pytest.raises(ValueError, match="mask left must be >= 0 or None; given -1"):
        Mask(left=-1)
    with pytest.raises(ValueError, match="strictly upwards"):
        documents((0, 5, 5, 12))
    with pytest.raises(ValueError, match="documents of 12 tokens with documents of 9"):
        documents((0, 12)) & documents((0, 9))
    with pytest.raises(ValueError, match="from 0 to 10"):
        documents((0, 12)).bounds(10)
