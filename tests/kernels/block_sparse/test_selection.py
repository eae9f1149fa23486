"""Selections of two parts: both count, and they share no key."""

from dataclasses import replace

import pytest
import torch

from longctx.kernels.block_sparse.lanes import lanes_of
from longctx.kernels.block_sparse.reference import selected_attention
from longctx.kernels.block_sparse.selection import Selection, allowed
from tests.support.selections import document_starts, random_blocks, two_parts

TOTAL = 24
POSITIONS = torch.arange(TOTAL)
DOCUMENTS = torch.stack([document_starts((0, 1, 9, TOTAL)), document_starts((0, TOTAL))])


def window(size: int, *, heads: int = 1) -> Selection:
    place = POSITIONS[None, :, None, None].expand(1, -1, heads, -1)
    return Selection(lo=(place - size + 1).clamp(min=0), hi=place, block_size=4)


@pytest.mark.parametrize(("heads", "beside_heads"), [(4, 2), (2, 4), (2, 2)])
def test_what_either_part_shows_is_seen(heads, beside_heads):
    both = two_parts(POSITIONS, DOCUMENTS, heads=heads, beside_heads=beside_heads)
    near, far = both.parts()
    assert near.beside is None
    assert far is both.beside
    most = max(heads, beside_heads)
    shown = [allowed(part, POSITIONS).repeat_interleave(most // part.heads, dim=1) for part in (near, far)]
    assert shown[1].any()
    assert torch.equal(allowed(both, POSITIONS), shown[0] | shown[1])
    assert not (shown[0] & shown[1]).any()


def test_a_key_of_two_parts_is_found():
    far = window(9)
    assert (allowed(replace(window(3), beside=replace(far, hi=far.hi - 3)), POSITIONS) == allowed(far, POSITIONS)).all()
    with pytest.raises(AssertionError, match="share a key"):
        allowed(replace(window(3), beside=replace(far, hi=far.hi - 2)), POSITIONS)


def test_parts_are_of_the_same_queries_and_tiles():
    with pytest.raises(AssertionError):
        replace(window(3), beside=replace(window(3), block_size=8))
    few = window(3)
    with pytest.raises(AssertionError):
        replace(window(3), beside=replace(few, lo=few.lo[:, 1:], hi=few.hi[:, 1:]))


def test_nobody_forgets_a_part():
    """Kernels refuse what they would leave out, and so do gates, which belong to the slots of one."""
    both = two_parts(POSITIONS, DOCUMENTS, heads=2, beside_heads=2)
    with pytest.raises(AssertionError, match="parts"):
        lanes_of(both, POSITIONS)
    x = torch.zeros(2, TOTAL, 2, 4)
    with pytest.raises(AssertionError, match="gates"):
        selected_attention(x, x, x, selection=both, k_positions=POSITIONS, gates=torch.zeros(2, TOTAL, 2, 1))


def test_heads_are_those_of_a_part():
    blocks = random_blocks(POSITIONS, DOCUMENTS, heads=4, slots=3)
    assert torch.equal(allowed(blocks.of_heads(1, 3), POSITIONS), allowed(blocks, POSITIONS)[:, 1:3])
    with pytest.raises(AssertionError):
        two_parts(POSITIONS, DOCUMENTS, heads=4, beside_heads=2).of_heads(0, 1)
