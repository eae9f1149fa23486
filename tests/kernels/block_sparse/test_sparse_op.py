"""Which kernel of sparse attention serves what."""

from dataclasses import replace

import pytest
import torch

from longctx.kernels.block_sparse.op import KERNELS, resolve_kernel
from longctx.kernels.contract import Request

ON_CPU = Request(device_type="cpu", dtype=torch.float32, head_dim=64, v_head_dim=64, num_heads=4, num_kv_heads=2)
ON_GPU = replace(ON_CPU, device_type="cuda", dtype=torch.bfloat16)


@pytest.mark.parametrize("weights", ["softmax", "gated", "sum"])
def test_auto_takes_triton_on_a_gpu_where_it_serves(weights):
    assert resolve_kernel("auto", ON_CPU, weights).name == "torch"
    assert resolve_kernel("auto", ON_GPU, weights).name == "triton"
    assert resolve_kernel("auto", replace(ON_GPU, dtype=torch.float64), weights).name == "torch"


@pytest.mark.parametrize("name", KERNELS[1:])
def test_a_name_means_that_kernel(name):
    assert resolve_kernel(name, ON_GPU, "softmax").name == name


def test_unknown_names():
    with pytest.raises(ValueError, match="kernel=fast is not known; known are auto, torch, triton, reference"):
        resolve_kernel("fast", ON_CPU, "softmax")


def test_a_named_kernel_says_why_not():
    message = r"kernel=triton cannot serve this: .*interpreter.*; set kernel=torch\|reference"
    with pytest.raises(ValueError, match=message):
        resolve_kernel("triton", ON_CPU, "softmax")
