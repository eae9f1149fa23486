"""The stand-in for out carries delta as exactly as the dtype of dout lets two numbers do."""

import pytest
import torch

from longctx.kernels.softmax.aten import CpuFlash
from longctx.kernels.softmax.delta import row_delta, stand_in_out
from longctx.kernels.softmax.torch_kernel import TorchKernel
from tests.kernels.softmax.cases import MASKS, assert_low_precision, inputs

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dim", [1, 2, 64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gives_delta_back(dtype, dim):
    generator = torch.Generator().manual_seed(dim)
    dout, out = (torch.randn(2, 50, 3, dim, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    delta = row_delta(dout, out)
    stand_in = stand_in_out(dout, delta)
    error = (row_delta(dout, stand_in) - delta).abs()
    eps = torch.finfo(dtype).eps
    # Two 16-bit numbers where the two largest of |dout| are comparable, which among 64 they are; else one.
    relative = eps**2 if dtype.itemsize == 2 and dim == 64 else eps
    assert (error <= 2 * relative * delta.abs() + 1e-30).all()
    assert ((stand_in != 0).sum(-1) <= 2).all()
    assert (stand_in.abs().amax(-1) <= 1.01 * out.abs().double().sum(-1)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_zeros_and_lonely_or_tiny_numbers(dtype):
    dout = torch.zeros(1, 4, 1, 8, dtype=dtype)
    dout[0, 1, 0, 3] = 2.0  # one dim only
    dout[0, 2, 0, :2] = torch.tensor([1.0, 2.0**-24])  # what is left, over the second, is more than float16 holds
    dout[0, 3] = torch.finfo(dtype).tiny
    delta = torch.tensor([[[0.0, 5.0, 1000.3, 0.0]]], dtype=torch.promote_types(dtype, torch.float32))
    stand_in = stand_in_out(dout, delta)
    assert torch.isfinite(stand_in).all()
    assert (stand_in[0, 0] == 0).all() and stand_in[0, 1, 0, 3] == 2.5
    assert (row_delta(dout, stand_in) - delta).abs().max() <= 1001 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_hold_the_budget_where_out_is_aligned_with_dout(dtype):
    """Then delta is as large as it can be, and one rounded number in place of out would lose 3 to 4 times as much."""
    q, k, v, dout = inputs(4, 2, torch.float64, head_dim=64)
    v = 0.3 * v + v[:1, :1]
    dout = 0.3 * dout + 2 * v[:, :1].repeat_interleave(2, dim=2)
    assert_low_precision(TorchKernel(CpuFlash()), [x.to(dtype) for x in (q, k, v, dout)], MASKS["causal"])
