"""The blocked primitive by itself: any band of any rectangle, and memory that does not grow with rows x columns."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from longctx.kernels.contract import Scores
from longctx.kernels.positions import Piece, Segment, make_tile
from longctx.kernels.softmax import blocked
from longctx.kernels.softmax.blocked import Blocked
from longctx.kernels.softmax.delta import row_delta
from longctx.kernels.softmax.rectangles import Rectangle, rectangles
from longctx.kernels.softmax.reference import dense_attention

SCORES = Scores(softmax_scale=0.3, softcap=2.0)


def tensors(n: int, m: int, *, heads: int, kv_heads: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(n * 100 + m)
    shapes = [(1, n, heads, 6), (1, m, kv_heads, 6), (1, m, kv_heads, 3), (1, n, heads, 3)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


@given(
    counts=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    band=st.tuples(st.integers(-45, 45), st.integers(-45, 45)),
    blocks=st.tuples(st.integers(1, 16), st.integers(1, 16), st.integers(1, 600)),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1)]),
)
@settings(max_examples=60, deadline=None)
def test_any_band_in_any_blocks_equals_dense_attention(counts, band, blocks, heads):
    whole = make_tile(Piece(0, Segment(0, 1, counts[0])), Piece(0, Segment(0, 1, counts[1])), lo=band[0], hi=band[1])
    for shape in rectangles(whole) if whole is not None else ():
        q, k, v, dout = tensors(shape.q_count, shape.k_count, heads=heads[0], kv_heads=heads[1])
        difference = torch.arange(shape.k_count)[None, :] - torch.arange(shape.q_count)[:, None]
        allowed = {
            "full": torch.ones_like(difference, dtype=torch.bool),
            "causal": difference <= 0,
            "band": (difference >= shape.lo) & (difference <= shape.hi),
        }[shape.kind]
        for x in (q, k, v):
            x.requires_grad_()
        out, lse = dense_attention(q, k, v, allowed=allowed, softmax_scale=0.3, softcap=2.0)
        want = [out, lse, *torch.autograd.grad(out, (q, k, v), dout)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(blocked.BLOCKS, "cpu", blocks)
            got = both(q.detach(), k.detach(), v.detach(), dout, shape)
        for ours, ref in zip(got, want, strict=True):
            assert (ours - ref).abs().max() < 1e-12


def both(q, k, v, dout, shape) -> list[torch.Tensor]:
    primitive = Blocked()
    out, lse = primitive.forward(q, k, v, shape=shape, scores=SCORES)
    row_term = primitive.row_term(dout, row_delta(dout, out))
    return [
        out,
        lse,
        *primitive.backward(q, k, v, shape=shape, scores=SCORES, dout=dout, row_term=row_term, lse=lse),
    ]


class LargestTensor(TorchDispatchMode):
    """Note the largest storage that an operation returns."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, torch.Tensor):
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (8, 1)])
@pytest.mark.parametrize("kind", ["full", "causal"])
def test_no_tensor_is_larger_than_inputs_results_or_a_block(kind, heads, kv_heads):
    n = 3000
    args = tensors(n, n, heads=heads, kv_heads=kv_heads, dtype=torch.bfloat16)
    with LargestTensor() as largest:
        both(*args, Rectangle(kind, 0, n, 0, n))
    rows, columns, scores = blocked.BLOCKS["cpu"]
    block = 4 * max(scores, rows * columns)
    assert largest.bytes <= max(block, 4 * args[0].numel())
    assert largest.bytes < 4 * n * n / 10  # the point of it
