"""`kernel=auto` on a GPU: who computes which work, and that each gives its kernel's numbers."""

from dataclasses import replace

import pytest
import torch

from longctx.kernels.contract import Request, Work, WorkList, whole
from longctx.kernels.mask import Mask, causal, documents, full, sliding_window
from longctx.kernels.positions import cut
from longctx.kernels.softmax.auto_kernel import AutoKernel
from longctx.kernels.softmax.blocked import Blocked
from longctx.kernels.softmax.op import resolve_kernel
from longctx.kernels.softmax.reference import ReferenceKernel
from longctx.kernels.softmax.torch_kernel import TorchKernel
from longctx.kernels.tiles import tiles_between
from longctx.parallel.layout import Layout
from tests.kernels.softmax.cases import MASKS, assert_low_precision, dense, inputs, largest_error, run

AUTO = AutoKernel(TorchKernel(Blocked()), ReferenceKernel())
REQUEST = Request(device_type="cuda", dtype=torch.bfloat16, head_dim=64, v_head_dim=64, num_heads=4, num_kv_heads=2)


def hop(layout: Layout, ranks: tuple[int, int], mask: Mask, total: int = 64) -> WorkList:
    queries, keys = (cut(layout.segments(rank, total), mask.bounds(total)) for rank in ranks)
    return whole(tiles_between(queries, keys, mask=mask, total=total), heads=4, kv_heads=2)


@pytest.mark.parametrize(
    ("layout", "ranks", "mask", "plain"),
    [
        (Layout("striped", 2), (0, 0), causal(), True),
        (Layout("striped", 2), (0, 1), causal(), True),  # shifted by one
        (Layout("contiguous", 2), (1, 0), causal(), True),
        (Layout("contiguous", 2), (1, 0), full(), True),
        (Layout("contiguous", 1), (0, 0), sliding_window(5), False),
        (Layout("contiguous", 1), (0, 0), documents((0, 20, 64)) & causal(), False),
        (Layout("zigzag", 2), (0, 0), causal(), False),
    ],
)
def test_plain_hops_go_to_the_library(layout, ranks, mask, plain):
    work = hop(layout, ranks, mask)
    assert AUTO.chosen(work) is (AUTO.plain if plain else AUTO.general)
    assert AUTO.serving(work) == ("torch:Blocked" if plain else "reference")
    # Both of two parts have to be plain.
    near = hop(Layout("contiguous", 1), (0, 0), sliding_window(5))
    rows = [slice(0, 1), slice(1, 2)]
    both = [Work(row, slice(0, 4), slice(0, 2), x.parts[0].tiles) for row, x in zip(rows, (work, near), strict=True)]
    assert AUTO.chosen(WorkList(tuple(both))) is AUTO.general


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_equals_dense_attention(mask):
    args = inputs(4, 2, torch.float64)
    assert largest_error(run(AUTO, *args, mask), dense(*args, mask)) < 1e-12


def test_on_a_gpu_of_its_own_accord():
    pytest.importorskip("triton")
    auto = resolve_kernel("auto", REQUEST)
    assert isinstance(auto, AutoKernel) and (auto.plain.name, auto.general.name) == ("torch", "triton")
    for changed in ({"softcap": True}, {"dtype": torch.float32}, {"v_head_dim": 32}):
        assert resolve_kernel("auto", replace(REQUEST, **changed)).name == "triton"
    for changed, name in (
        ({"dtype": torch.float64}, "torch"),
        ({"predicate": True}, "reference"),
        ({"head_dim": 320, "v_head_dim": 320}, "torch"),
        ({"device_type": "cpu"}, "torch"),
    ):
        assert resolve_kernel("auto", replace(REQUEST, **changed)).name == name


def test_triton_is_refused_where_it_cannot_run():
    pytest.importorskip("triton")
    with pytest.raises(ValueError, match=r"attention.kernel=triton cannot serve this: it runs on CUDA devices.*torch"):
        resolve_kernel("triton", replace(REQUEST, device_type="cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_on_a_device(mask):
    args = [x.cuda() for x in inputs(4, 2, torch.bfloat16, head_dim=64)]
    assert_low_precision(resolve_kernel("auto", REQUEST), args, mask)
