"""Local kernels against dense attention: every mask, GQA, softcap, dtypes under the 2x rule, odd memory, blind rows."""

import pytest
import torch

from longctx.kernels.contract import Request, Scores, whole
from longctx.kernels.mask import causal, predicate
from longctx.kernels.merge import empty_partial
from longctx.kernels.positions import Segment, cut
from longctx.kernels.softmax import blocked
from longctx.kernels.softmax.aten import CpuFlash, CudaFlash
from longctx.kernels.softmax.blocked import Blocked
from longctx.kernels.softmax.delta import row_delta
from longctx.kernels.softmax.op import choose_primitive, resolve_kernel
from longctx.kernels.softmax.rectangles import Rectangle
from longctx.kernels.softmax.reference import ReferenceKernel
from longctx.kernels.softmax.torch_kernel import TorchKernel
from longctx.kernels.tiles import tiles_between
from tests.kernels.softmax.cases import (
    HEADS,
    MASKS,
    T,
    assert_low_precision,
    dense,
    inputs,
    largest_error,
    poisoned,
    request,
    run,
)

ATEN, BLOCKED, REFERENCE = TorchKernel(CpuFlash()), TorchKernel(Blocked()), ReferenceKernel()
KERNELS = {"aten": ATEN, "blocked": BLOCKED, "reference": REFERENCE}
with_each_mask = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
with_each_heads = pytest.mark.parametrize(("heads", "kv_heads"), HEADS)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Cut even these short sequences into many blocks, of several shapes."""
    monkeypatch.setitem(blocked.BLOCKS, "cpu", (24, 20, 1000))


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS.keys())
@with_each_heads
@with_each_mask
def test_float64_equals_dense_attention(mask, heads, kv_heads, kernel):
    args = inputs(heads, kv_heads, torch.float64)
    assert largest_error(run(kernel, *args, mask), dense(*args, mask)) < 1e-12


@pytest.mark.parametrize("kernel", [BLOCKED, REFERENCE], ids=["blocked", "reference"])
@pytest.mark.parametrize(("head_dim", "v_head_dim"), [(16, 16), (7, 5), (3, 24)])
@pytest.mark.parametrize("softcap", [None, 1.5, 50.0])
@with_each_heads
@with_each_mask
def test_softcap_and_unequal_head_dims_equal_dense_attention(
    mask, heads, kv_heads, softcap, head_dim, v_head_dim, kernel
):
    args = inputs(heads, kv_heads, torch.float64, head_dim=head_dim, v_head_dim=v_head_dim)
    args[0] *= 3  # scores well into the cap of 1.5
    assert largest_error(run(kernel, *args, mask, softcap=softcap), dense(*args, mask, softcap=softcap)) < 1e-12


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@with_each_mask
def test_low_precision_is_within_twice_what_torch_loses(mask, dtype, softcap):
    args = inputs(4, 2, dtype)
    kernel = resolve_kernel("torch", request(*args[:3], softcap=softcap))
    assert_low_precision(kernel, args, mask, softcap=softcap)
    assert_low_precision(BLOCKED, args, mask, softcap=softcap)


@pytest.mark.parametrize("last_stride", [1, 2, 3])
@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS.keys())
def test_memory_that_nothing_wrote_does_not_leak_into_results(kernel, last_stride):
    args = inputs(4, 2, torch.float64)
    odd = [poisoned(x, last_stride=last_stride) for x in args]
    mask = MASKS["documents"]
    assert largest_error(run(kernel, *odd, mask), dense(*args, mask)) < 1e-12


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS.keys())
def test_rows_without_keys_stay_zero_and_give_no_gradient(kernel):
    q, k, v, dout = inputs(4, 2, torch.float64)
    # The queries' shard starts before the keys' shard: the first rows are blind.
    queries, keys = (cut((Segment(start, 1, T),), (0, T + 20)) for start in (0, 20))
    tiles = tiles_between(queries, keys, mask=causal(), total=T + 20)
    work, scores = whole(tiles, heads=4, kv_heads=2), Scores(softmax_scale=0.25)
    partial = empty_partial(q, v_head_dim=16)
    kernel.forward(q, k, v, work=work, scores=scores, partial=partial)
    assert torch.isneginf(partial.lse[:, :, :20]).all() and torch.isfinite(partial.lse[:, :, 20:]).all()
    assert (partial.out[:, :20] == 0).all()
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    delta = row_delta(dout, partial.out)
    kernel.backward(q, k, v, work=work, scores=scores, dout=dout, delta=delta, lse=partial.lse, dq=dq, dk=dk, dv=dv)
    assert (dq[:, :20] == 0).all()
    assert all(torch.isfinite(x).all() for x in (dq, dk, dv))
    assert (dk[:, T - 20 :] == 0).all() and (dv[:, T - 20 :] == 0).all()


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS.keys())
def test_hidden_scores_that_would_overflow_change_nothing(kernel):
    q, k, v, dout = inputs(2, 2, torch.float64)
    k[:, -1] *= 1e6  # seen by the last query only, whose weight on it is 1 or 0
    q[:, -1] = 0
    assert largest_error(run(kernel, q, k, v, dout, causal()), dense(q, k, v, dout, causal())) < 1e-9


def test_predicates_are_evaluated_by_the_reference_and_refused_elsewhere():
    args = inputs(4, 2, torch.float64)
    mask = causal() & predicate(lambda q, k: (q * k + q) % 3 != 0)
    assert largest_error(run(REFERENCE, *args, mask, softcap=2.0), dense(*args, mask, softcap=2.0)) < 1e-12
    with pytest.raises(AssertionError, match="no predicate"):
        run(BLOCKED, *args, mask)


def test_selection():
    def ask(**changed) -> Request:
        plain = {"head_dim": 16, "v_head_dim": 16, "num_heads": 4, "num_kv_heads": 2}
        return Request(**{"device_type": "cpu", "dtype": torch.float32, **plain, **changed})

    served = [ask(), ask(softcap=True), ask(v_head_dim=24), ask(device_type="cuda", dtype=torch.float64)]
    assert [type(choose_primitive(r)) for r in served] == [CpuFlash, Blocked, Blocked, Blocked]
    assert type(choose_primitive(ask(device_type="cuda", dtype=torch.bfloat16))) is CudaFlash
    assert type(choose_primitive(ask(device_type="cuda", head_dim=36, v_head_dim=36))) is Blocked
    assert {resolve_kernel(name, r).name for r in served for name in ("auto", "torch")} == {"torch"}

    assert resolve_kernel("auto", ask(predicate=True)).name == "reference"
    with pytest.raises(
        ValueError,
        match="attention.kernel=torch cannot serve this: an arbitrary predicate has no band: only the reference kernel "
        "evaluates it densely; set attention.kernel=reference",
    ):
        resolve_kernel("torch", ask(predicate=True))
    with pytest.raises(ValueError, match="flash is not known; known are auto, torch, triton, flash_attn, reference"):
        resolve_kernel("flash", ask())
    with pytest.raises(ValueError, match="num_heads must be a multiple of num_kv_heads; given 4 and 3"):
        ask(num_kv_heads=3)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_scores_are_refused(bad):
    with pytest.raises(ValueError, match="softcap must be a finite number > 0"):
        Scores(softmax_scale=1.0, softcap=bad)
    if bad != bad or bad == float("inf"):
        with pytest.raises(ValueError, match="softmax_scale must be a finite number"):
            Scores(softmax_scale=bad)


@pytest.mark.gpu
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@with_each_heads
@with_each_mask
def test_cuda_is_within_twice_what_torch_loses(mask, heads, kv_heads, dtype, softcap):
    args = [x.cuda() for x in inputs(heads, kv_heads, dtype, head_dim=64)]
    kernel = resolve_kernel("torch", request(*args[:3], softcap=softcap))
    assert_low_precision(kernel, args, mask, softcap=softcap)


@pytest.mark.parametrize("kind", ["full", "causal", "band"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_cuda_calls_fit_this_torchs_signatures(dtype, kind):
    """Without a GPU: the calls are traced on the meta device, which checks arguments, shapes and dtypes."""
    q = torch.empty(2, 64, 4, 32, dtype=dtype, device="meta")
    k, v = (torch.empty(2, 64, 2, 32, dtype=dtype, device="meta") for _ in range(2))
    shape, primitive, scores = Rectangle(kind, 0, 64, 0, 64, -8, 0), CudaFlash(), Scores(softmax_scale=0.5)
    out, lse = primitive.forward(q, k, v, shape=shape, scores=scores)
    assert out.shape == q.shape and out.dtype == dtype
    assert lse.shape == (2, 4, 64) and lse.dtype == torch.float32
    row_term = primitive.row_term(torch.empty_like(q), lse)
    assert row_term.shape == out.shape and row_term.dtype == dtype
    grads = primitive.backward(
        q, k, v, shape=shape, scores=scores, dout=torch.empty_like(q), row_term=row_term, lse=lse
    )
    assert [grad.shape for grad in grads] == [q.shape, k.shape, v.shape]
