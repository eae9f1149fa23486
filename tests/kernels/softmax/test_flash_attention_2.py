"""flash-attn's adapter: against a stand-in for the package everywhere, against the package on a GPU.

The stand-in has the two functions' signatures and alignments and computes with dense attention; what is tested without
a GPU is which rectangles and windows it is asked for, and in which form.
"""

import importlib.machinery
import sys
import types
from importlib.metadata import PackageNotFoundError

import pytest
import torch
from torch import Tensor

from longctx.kernels.contract import Request
from longctx.kernels.softmax import flash_attention_2
from longctx.kernels.softmax.flash_attention_2 import FlashAttention2
from longctx.kernels.softmax.op import resolve_kernel
from longctx.kernels.softmax.reference import dense_attention
from longctx.kernels.softmax.torch_kernel import TorchKernel
from tests.kernels.softmax.cases import HEADS, MASKS, assert_low_precision, dense, inputs, largest_error, run


def allowed(n: int, m: int, *, causal: bool, left: int, right: int) -> Tensor:
    """Return bool `[n, m]` as flash-attn's README defines it: aligned to the bottom right corner, -1 = no bound."""
    assert not (causal and (left, right) != (-1, -1))
    distance = torch.arange(m)[None, :] - (torch.arange(n)[:, None] + m - n)
    if causal:
        right = 0
    seen = torch.ones(n, m, dtype=torch.bool)
    return seen & (distance >= -left if left >= 0 else seen) & (distance <= right if right >= 0 else seen)


class StandIn(types.ModuleType):
    """`flash_attn.flash_attn_interface`."""

    def __init__(self) -> None:
        super().__init__("flash_attn.flash_attn_interface")
        self.calls = 0

    def _flash_attn_forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dropout_p: float,
        softmax_scale: float,
        causal: bool,
        window_size_left: int,
        window_size_right: int,
        softcap: float,
        alibi_slopes: Tensor | None,
        return_softmax: bool,
    ) -> tuple[Tensor, ...]:
        assert dropout_p == 0 and alibi_slopes is None and not return_softmax
        self.calls += 1
        seen = allowed(q.shape[1], k.shape[1], causal=causal, left=window_size_left, right=window_size_right)
        assert seen.any(-1).all()
        out, lse = dense_attention(q, k, v, allowed=seen, softmax_scale=softmax_scale, softcap=softcap or None)
        return out, lse, torch.empty(0), torch.empty(2)

    def _flash_attn_backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        softmax_lse: Tensor,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
        dropout_p: float,
        softmax_scale: float,
        causal: bool,
        window_size_left: int,
        window_size_right: int,
        softcap: float,
        alibi_slopes: Tensor | None,
        deterministic: bool,
        rng_state: Tensor | None = None,
    ) -> Tensor:
        assert dropout_p == 0 and alibi_slopes is None and deterministic
        assert all(x.is_contiguous() for x in (dout, q, k, v, out, softmax_lse))
        group = q.shape[2] // k.shape[2]
        keys, values = (x.repeat_interleave(group, dim=2) for x in (k, v))
        seen = allowed(q.shape[1], k.shape[1], causal=causal, left=window_size_left, right=window_size_right)
        s = torch.einsum("bqhd,bkhd->bhqk", q, keys) * softmax_scale
        slope = torch.ones_like(s)
        if softcap:
            s = softcap * torch.tanh(s / softcap)
            slope = 1 - (s / softcap) ** 2
        p = torch.exp(s - softmax_lse[..., None]).masked_fill(~seen, 0)
        delta = (dout * out).sum(-1).transpose(1, 2)
        ds = p * (torch.einsum("bqhd,bkhd->bhqk", dout, values) - delta[..., None]) * slope * softmax_scale
        dq.copy_(torch.einsum("bhqk,bkhd->bqhd", ds, keys))
        dk.copy_(torch.einsum("bhqk,bqhd->bkhd", ds, q).unflatten(2, (-1, group)).sum(3))
        dv.copy_(torch.einsum("bhqk,bqhd->bkhd", p, dout).unflatten(2, (-1, group)).sum(3))
        return delta


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    package, module = types.ModuleType("flash_attn"), StandIn()
    package.__spec__ = importlib.machinery.ModuleSpec("flash_attn", None)
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setattr(flash_attention_2, "version", lambda name: "2.8.3+cu12")
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", module)
    return module


def ask(**changed: object) -> Request:
    plain = {"head_dim": 64, "v_head_dim": 64, "num_heads": 4, "num_kv_heads": 2}
    return Request(**{"device_type": "cuda", "dtype": torch.bfloat16, **plain, **changed})  # type: ignore[arg-type]


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_rectangles_and_windows(stand_in, mask, heads, kv_heads, softcap):
    args = inputs(heads, kv_heads, torch.float64)
    kernel = TorchKernel(FlashAttention2(), name="flash_attn")
    assert largest_error(run(kernel, *args, mask, softcap=softcap), dense(*args, mask, softcap=softcap)) < 1e-12
    # A window is one call, whatever its height.
    documents = 4 if mask is MASKS["documents"] else 1
    assert stand_in.calls == documents


def test_selection(stand_in):
    assert resolve_kernel("flash_attn", ask(softcap=True)).name == "flash_attn"
    assert FlashAttention2().unsupported(ask()) is None
    for changed, reason in (
        ({"dtype": torch.float32}, "float32"),
        ({"device_type": "cpu"}, "CUDA"),
        ({"head_dim": 60, "v_head_dim": 60}, "multiple of 8"),
        ({"v_head_dim": 32}, "equal head dims"),
    ):
        assert reason in str(FlashAttention2().unsupported(ask(**changed)))


@pytest.mark.parametrize("found", ["2.6.3", "2.9.0", "4.0.0b1"])
def test_other_versions_are_refused(stand_in, monkeypatch, found):
    monkeypatch.setattr(flash_attention_2, "version", lambda name: found)
    assert f"2.7.3 to 2.8 is needed; {found} is installed" in str(FlashAttention2().unsupported(ask()))


def test_without_the_package(monkeypatch):
    def absent(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(flash_attention_2, "version", absent)
    with pytest.raises(ValueError, match="attention.kernel=flash_attn cannot serve this: flash-attn is not installed"):
        resolve_kernel("flash_attn", ask())


@pytest.mark.gpu
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_on_a_device(mask, softcap):
    pytest.importorskip("flash_attn")
    args = [x.cuda() for x in inputs(4, 2, torch.bfloat16, head_dim=64)]
    assert_low_precision(resolve_kernel("flash_attn", ask()), args, mask, softcap=softcap)
