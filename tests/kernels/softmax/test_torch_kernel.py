"""The ATen kernel against the reference: every mask, GQA, dtypes under the 2x rule, odd memory."""

import pytest
import torch

from longctx.kernels.contract import Request, Scores
from longctx.kernels.mask import causal, documents, full, sliding_window
from longctx.kernels.merge import empty_partial
from longctx.kernels.positions import Segment, cut
from longctx.kernels.softmax.aten import CudaFlash
from longctx.kernels.softmax.delta import row_delta
from longctx.kernels.softmax.op import resolve_kernel
from longctx.kernels.softmax.rectangles import Rectangle
from longctx.kernels.softmax.reference import dense_attention
from longctx.kernels.tiles import tiles_between
from tests.support.tolerance import assert_within_budget

T = 67
MASKS = {
    "full": full(),
    "causal": causal(),
    "window": sliding_window(9),
    "two_sided": sliding_window(3, 2),
    "documents": documents((0, 1, 30, 31, 67)) & causal(),
}
HEADS = [(4, 4), (4, 2), (6, 1)]


def inputs(heads: int, kv_heads: int, dtype: torch.dtype, head_dim: int = 16) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(heads * 10 + kv_heads)
    shapes = [(2, T, heads, head_dim), (2, T, kv_heads, head_dim), (2, T, kv_heads, head_dim), (2, T, heads, head_dim)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def run(name: str, q, k, v, dout, mask, device: str = "cpu") -> list[torch.Tensor]:
    request = Request(
        device_type=device,
        dtype=q.dtype,
        head_dim=q.shape[-1],
        v_head_dim=v.shape[-1],
        num_heads=q.shape[2],
        num_kv_heads=k.shape[2],
    )
    kernel = resolve_kernel(name, request)
    whole = cut((Segment(0, 1, q.shape[1]),), mask.bounds(q.shape[1]))
    tiles = tiles_between(whole, whole, mask=mask)
    scores = Scores(softmax_scale=q.shape[-1] ** -0.5)
    partial = empty_partial(q, v_head_dim=v.shape[-1])
    kernel.forward(q, k, v, tiles=tiles, scores=scores, partial=partial)
    grads = [torch.zeros(x.shape, dtype=partial.out.dtype, device=x.device) for x in (q, k, v)]
    kernel.backward(
        q,
        k,
        v,
        tiles=tiles,
        scores=scores,
        dout=dout,
        delta=row_delta(dout, partial.out.to(q.dtype)),
        lse=partial.lse,
        dq=grads[0],
        dk=grads[1],
        dv=grads[2],
    )
    return [partial.out, partial.lse, *grads]


def dense(q, k, v, dout, mask) -> list[torch.Tensor]:
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    positions = torch.arange(q.shape[1], device=q.device)
    out, lse = dense_attention(q, k, v, allowed=mask.allowed(positions, positions))
    return [out.detach(), lse.detach(), *torch.autograd.grad(out, (q, k, v), dout)]


@pytest.mark.parametrize("kernel", ["torch", "reference"])
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_float64_equals_dense_attention(mask, heads, kv_heads, kernel):
    args = inputs(heads, kv_heads, torch.float64)
    for got, want in zip(run(kernel, *args, mask), dense(*args, mask), strict=True):
        assert (got - want).abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_low_precision_is_within_twice_what_torch_loses(mask, dtype):
    args = inputs(4, 2, dtype)
    wide = [x.double() for x in args]
    got = run("torch", *args, mask)
    truth, plain = dense(*wide, mask), dense(*args, mask)
    for index, (ours, same, ref) in enumerate(zip(got, plain, truth, strict=True)):
        assert_within_budget(ours, same, ref, factor=2.0 if index < 2 else 3.0)


@pytest.mark.parametrize("last_stride", [1, 2, 3])
def test_memory_that_nothing_wrote_does_not_leak_into_results(last_stride):
    args = inputs(4, 2, torch.float64)
    padded = []
    for x in args:  # every tensor inside a larger one full of NaN, so strides are odd and neighbours poisonous
        box = torch.full((2, T + 3, x.shape[2] + 1, 18, last_stride), float("nan"), dtype=x.dtype)
        inner = box[:, 1 : T + 1, 1:, :16, 0]
        inner.copy_(x)
        assert inner.stride(-1) == last_stride
        padded.append(inner)
    mask = MASKS["documents"]
    for got, want in zip(run("torch", *padded, mask), dense(*args, mask), strict=True):
        assert (got - want).abs().max() < 1e-12


@pytest.mark.parametrize("kernel", ["torch", "reference"])
def test_rows_without_keys_stay_zero_and_give_no_gradient(kernel):
    q, k, v, dout = inputs(4, 2, torch.float64)
    request = Request(device_type="cpu", dtype=q.dtype, head_dim=16, v_head_dim=16, num_heads=4, num_kv_heads=2)
    local = resolve_kernel(kernel, request)
    # The queries' shard starts before the keys' shard: the first rows are blind.
    queries, keys = (cut((Segment(start, 1, T),), (0, T + 20)) for start in (0, 20))
    tiles = tiles_between(queries, keys, mask=causal())
    partial = empty_partial(q, v_head_dim=16)
    local.forward(q, k, v, tiles=tiles, scores=Scores(softmax_scale=0.25), partial=partial)
    assert torch.isneginf(partial.lse[:, :, :20]).all() and torch.isfinite(partial.lse[:, :, 20:]).all()
    assert (partial.out[:, :20] == 0).all()
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    local.backward(
        q,
        k,
        v,
        tiles=tiles,
        scores=Scores(softmax_scale=0.25),
        dout=dout,
        delta=row_delta(dout, partial.out),
        lse=partial.lse,
        dq=dq,
        dk=dk,
        dv=dv,
    )
    assert (dq[:, :20] == 0).all()
    assert all(torch.isfinite(x).all() for x in (dq, dk, dv))
    assert (dk[:, T - 20 :] == 0).all() and (dv[:, T - 20 :] == 0).all()


def test_selection():
    request = Request(device_type="cpu", dtype=torch.float32, head_dim=16, v_head_dim=24, num_heads=4, num_kv_heads=2)
    assert resolve_kernel("auto", request).name == "reference"
    with pytest.raises(
        ValueError, match=r"attention.kernel=torch cannot serve this: .* given 16 and 24; set .*=reference"
    ):
        resolve_kernel("torch", request)
    with pytest.raises(ValueError, match="attention.kernel=flash is not known; known are auto, torch, reference"):
        resolve_kernel("flash", request)
    with pytest.raises(ValueError, match="num_heads must be a multiple of num_kv_heads; given 4 and 3"):
        Request(device_type="cpu", dtype=torch.float32, head_dim=8, v_head_dim=8, num_heads=4, num_kv_heads=3)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_cuda_is_within_twice_what_torch_loses(mask, heads, kv_heads, dtype):
    args = [x.cuda() for x in inputs(heads, kv_heads, dtype, head_dim=64)]
    wide = [x.double() for x in args]
    got = run("torch", *args, mask, device="cuda")
    truth, plain = dense(*wide, mask), dense(*args, mask)
    for index, (ours, same, ref) in enumerate(zip(got, plain, truth, strict=True)):
        assert_within_budget(ours, same, ref, factor=2.0 if index < 2 else 3.0)


@pytest.mark.parametrize("kind", ["full", "causal", "band"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_cuda_calls_fit_this_torchs_signatures(dtype, kind):
    """Without a GPU: the calls are traced on the meta device, which checks arguments, shapes and dtypes."""
    q = torch.empty(2, 64, 4, 32, dtype=dtype, device="meta")
    k, v = (torch.empty(2, 64, 2, 32, dtype=dtype, device="meta") for _ in range(2))
    shape, primitive = Rectangle(kind, 0, 64, 0, 64, -8, 0), CudaFlash()
    out, lse = primitive.forward(q, k, v, shape=shape, scores=Scores(softmax_scale=0.5))
    assert out.shape == q.shape and out.dtype == dtype
    assert lse.shape == (2, 4, 64) and lse.dtype == torch.float32
    grads = primitive.backward(
        q, k, v, shape=shape, scores=Scores(softmax_scale=0.5), dout=torch.empty_like(q), row_term=out, lse=lse
    )
    assert [grad.shape for grad in grads] == [q.shape, k.shape, v.shape]
