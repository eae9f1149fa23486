"""The gates of the grouped softmax against dense scores, with every gradient."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from longctx.kernels.block_sparse.blocks import blocks_of
from longctx.kernels.block_sparse.routing import landmark
from longctx.kernels.block_sparse.routing.landmark import last_of_blocks, own_block_lse, picked_scores

DOCUMENTS = (13, 1, 7, 24, 2)
TOTAL, BLOCK = sum(DOCUMENTS), 8
HEADS, KV_HEADS, DIM = 4, 2, 6


def document_of() -> torch.Tensor:
    begin = torch.tensor((0, *DOCUMENTS[:-1])).cumsum(0)
    return torch.stack([begin.repeat_interleave(torch.tensor(DOCUMENTS)), torch.zeros(TOTAL, dtype=torch.int64)])


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def capped(scores: torch.Tensor, softcap: float | None) -> torch.Tensor:
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def same(got: torch.Tensor, want: torch.Tensor, inputs: list[torch.Tensor]) -> None:
    assert (got - want).abs().max() < 1e-11
    dout = draw(*want.shape, seed=9)
    for ours, true in zip(torch.autograd.grad(got, inputs, dout), torch.autograd.grad(want, inputs, dout), strict=True):
        assert (ours - true).abs().max() < 1e-11


@pytest.mark.parametrize("at_once", [1, 1 << 22])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_own_block_lse(softcap, at_once, monkeypatch):
    monkeypatch.setattr(landmark, "_AT_ONCE", at_once)
    q, k = draw(2, TOTAL, HEADS, DIM).requires_grad_(), draw(2, TOTAL, KV_HEADS, DIM, seed=1).requires_grad_()
    positions, first = torch.arange(TOTAL), document_of()
    got = own_block_lse(q, k, positions=positions, first=first, block_size=BLOCK, softcap=softcap)
    scores = torch.einsum("bqhd,bkhd->bqhk", q, k.repeat_interleave(HEADS // KV_HEADS, dim=2)) * DIM**-0.5
    begin = torch.maximum(first, positions // BLOCK * BLOCK)
    seen = (positions >= begin[..., None]) & (positions <= positions[:, None])
    want = capped(scores, softcap).masked_fill(~seen[:, :, None], float("-inf")).logsumexp(-1)
    same(got, want, [q, k])


def test_own_block_lse_of_some_blocks_of_a_sequence():
    q, k = draw(2, TOTAL, HEADS, DIM), draw(2, TOTAL, KV_HEADS, DIM, seed=1)
    positions, first = torch.arange(TOTAL), document_of()
    whole = own_block_lse(q, k, positions=positions, first=first, block_size=BLOCK)
    own = torch.cat([torch.arange(8, 16), torch.arange(40, TOTAL)])
    part = own_block_lse(q[:, own], k[:, own], positions=own, first=first[:, own], block_size=BLOCK)
    assert torch.equal(part, whole[:, own])


class Masks(TorchDispatchMode):
    """Notes the size of every bool tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.dtype == torch.bool:
            self.sizes.append(made.numel())
        return made


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_the_mask_of_own_blocks_is_made_for_some_at_a_time_and_not_kept(softcap, monkeypatch):
    monkeypatch.setattr(landmark, "_AT_ONCE", 1)
    q, k = draw(2, TOTAL, HEADS, DIM).requires_grad_(), draw(2, TOTAL, KV_HEADS, DIM, seed=1).requires_grad_()
    kept: list[torch.Tensor] = []
    with Masks() as masks:
        with saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
            lse = own_block_lse(
                q, k, positions=torch.arange(TOTAL), first=document_of(), block_size=BLOCK, softcap=softcap
            )
        torch.autograd.grad(lse.sum(), (q, k))
    assert max(masks.sizes) == 2 * BLOCK * BLOCK  # of one block in each row
    assert len(kept) == 5 and all(x.dtype != torch.bool for x in kept)


def test_picks_are_kept_in_32_bits():
    q, marks = draw(2, 11, HEADS, DIM).requires_grad_(), draw(2, 5, KV_HEADS, DIM, seed=1)
    blocks, kept = draw(2, 11, HEADS, 5, seed=2).argsort(-1), []
    with saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        picked_scores(q, marks, blocks[..., :-1])
    (picks,) = (x for x in kept if not x.is_floating_point())
    assert picks.untyped_storage().nbytes() == 4 * 2 * 11 * HEADS * 4  # nothing else lies in the same memory


@pytest.mark.parametrize("at_once", [1, 1 << 22])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("slots", [0, 3])
def test_picked_scores(slots, softcap, at_once, monkeypatch):
    monkeypatch.setattr(landmark, "_AT_ONCE", at_once)
    blocks = 5
    q, marks = draw(2, 11, HEADS, DIM).requires_grad_(), draw(2, blocks, KV_HEADS, DIM, seed=1).requires_grad_()
    picks = draw(2, 11, HEADS, blocks, seed=2).argsort(-1)[..., :slots]
    picks = torch.where(draw(2, 11, HEADS, slots, seed=3) > 0.8, -1, picks)
    got = picked_scores(q, marks, picks, softcap=softcap)
    scores = torch.einsum("bqhd,bnhd->bqhn", q, marks.repeat_interleave(HEADS // KV_HEADS, dim=2)) * DIM**-0.5
    want = capped(scores, softcap).gather(-1, picks.clamp(min=0)).masked_fill(picks < 0, 0.0)
    if slots:
        same(got, want, [q, marks])
    else:
        assert got.shape == want.shape


def test_the_last_token_of_each_block():
    x = draw(2, 15, 3)  # blocks 1 and 5 of 6, of which the last one is short
    blocks = blocks_of(torch.tensor([1, 5]), block_size=BLOCK, total=TOTAL, document_of=document_of())
    assert torch.equal(last_of_blocks(x, blocks), x[:, [7, 14]])


def test_a_rank_without_tokens():
    none, q = torch.arange(0), draw(2, 0, HEADS, DIM).requires_grad_()
    k, marks = draw(2, 0, KV_HEADS, DIM).requires_grad_(), draw(2, 5, KV_HEADS, DIM, seed=1).requires_grad_()
    lse = own_block_lse(q, k, positions=none, first=document_of()[:, none], block_size=BLOCK)
    scores = picked_scores(q, marks, torch.zeros(2, 0, HEADS, 3, dtype=torch.int64))
    assert lse.shape == (2, 0, HEADS) and scores.shape == (2, 0, HEADS, 3)
    dmarks = torch.autograd.grad(lse.sum() + scores.sum(), (q, k, marks))[2]
    assert (dmarks == 0).all()
    blocks = blocks_of(none, block_size=BLOCK, total=TOTAL, document_of=document_of())
    assert last_of_blocks(k, blocks).shape == (2, 0, KV_HEADS, DIM)


def test_16_bit_inputs_are_computed_in_float32():
    q, k = draw(1, TOTAL, HEADS, DIM).bfloat16().requires_grad_(), draw(1, TOTAL, KV_HEADS, DIM).bfloat16()
    lse = own_block_lse(q, k, positions=torch.arange(TOTAL), first=document_of()[:1], block_size=BLOCK)
    wide = own_block_lse(
        q.double(), k.double(), positions=torch.arange(TOTAL), first=document_of()[:1], block_size=BLOCK
    )
    assert lse.dtype == torch.float32 and (lse - wide).abs().max() < 1e-5
    (dq,) = torch.autograd.grad(lse.sum(), q)
    assert dq.dtype == torch.bfloat16
