"""Liger-Kernel's operations: a stand-in for the package everywhere, the package itself on a GPU.

The stand-in has the functions' arguments and their habit of overwriting what they were given; what is tested without a
GPU is that the model gives the same losses and gradients all the same.
"""

import importlib.machinery
import sys
import types
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from longctx import liger
from longctx.config import load_config
from longctx.loss import IGNORED, token_loss_sum
from longctx.model import Decoder, ModelConfig, everywhere, initial_weight
from longctx.setup import check_kernel
from tests.support.tolerance import GRADIENT_FACTOR, OUTPUT_FACTOR, assert_within_budget

CONFIG = ModelConfig(vocab_size=50, dim=32, num_layers=2, num_heads=2, num_kv_heads=1, hidden_dim=48, init_std=0.2)


class RMSNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, eps, offset=0.0, casting_mode="llama", in_place=True, row_mode=None):  # type: ignore[no-untyped-def]
        assert (offset, casting_mode, row_mode) == (0.0, "llama", None)
        ctx.save_for_backward(x, w)
        ctx.eps, ctx.in_place = eps, in_place
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * w

    @staticmethod
    def backward(ctx, dout):  # type: ignore[no-untyped-def]
        x, w = (t.detach().requires_grad_() for t in ctx.saved_tensors)
        with torch.enable_grad():
            out = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + ctx.eps) * w
            dx, dw = torch.autograd.grad(out, (x, w), dout)
        return dout.copy_(dx) if ctx.in_place else dx, dw, None, None, None, None


class SiLUMulFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(a, b)
        return F.silu(a) * b

    @staticmethod
    def backward(ctx, dout):  # type: ignore[no-untyped-def]
        a, b = ctx.saved_tensors
        gate = a.sigmoid()
        da, db = dout * b * gate * (1 + a * (1 - gate)), dout * F.silu(a)
        return a.data.copy_(da), b.data.copy_(db)


class CrossEntropyFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, weight, ignored, lse_square_scale, label_smoothing, reduction):  # type: ignore[no-untyped-def]
        assert (weight, lse_square_scale, label_smoothing, reduction) == (None, 0.0, 0.0, "sum")
        loss = F.cross_entropy(logits, labels, ignore_index=ignored, reduction="sum")
        grad = (logits.softmax(-1) - F.one_hot(labels.clamp(min=0), logits.shape[-1])) * (labels != ignored)[:, None]
        ctx.save_for_backward(logits.detach().copy_(grad))
        return loss, None, None, None

    @staticmethod
    def backward(ctx, dloss, *_):  # type: ignore[no-untyped-def]
        return ctx.saved_tensors[0] * dloss, None, None, None, None, None, None


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"rms_norm": "LigerRMSNormFunction", "swiglu": "LigerSiLUMulFunction"}
    names["cross_entropy"] = "LigerCrossEntropyFunction"
    functions = (RMSNormFunction, SiLUMulFunction, CrossEntropyFunction)
    package = types.ModuleType("liger_kernel")
    package.__spec__ = importlib.machinery.ModuleSpec("liger_kernel", None)
    monkeypatch.setitem(sys.modules, "liger_kernel", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.ops", types.ModuleType("liger_kernel.ops"))
    for (file, name), function in zip(names.items(), functions, strict=True):
        module = types.ModuleType(f"liger_kernel.ops.{file}")
        setattr(module, name, function)
        monkeypatch.setitem(sys.modules, module.__name__, module)


def loss_and_gradients(ops: str, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    config = replace(CONFIG, ops=ops)
    model = Decoder(config)
    for name, weight in model.named_parameters():
        weight.data = initial_weight(name, weight.shape, config=config, seed=0)
    model = model.to(device, dtype)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 50, (2, 17), generator=generator).to(device)
    labels = torch.randint(0, 50, (2, 17), generator=generator).to(device)
    labels[0, 3:6] = IGNORED

    def attend(q: Tensor, k: Tensor, v: Tensor, *, sink_logits: None) -> Tensor:
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True
        )
        return out.transpose(1, 2)

    places = everywhere(config, positions=torch.arange(17, device=device), attend=attend)
    loss = token_loss_sum(model(tokens, places=places), labels, ops=ops)
    return [loss.detach().cpu(), *(grad.cpu() for grad in torch.autograd.grad(loss, list(model.parameters())))]


def test_the_model_is_the_same(stand_in: None) -> None:
    for ours, want in zip(*(loss_and_gradients(ops, torch.float64) for ops in ("liger", "torch")), strict=True):
        assert (ours - want).abs().max() <= 1e-12 * want.abs().max()


def test_refused_at_the_start(stand_in: None, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(["model.ops=liger"])
    with pytest.raises(ValueError, match=r"model.ops=liger cannot be used: .*CUDA.*; set model.ops=torch"):
        check_kernel(config, device_type="cpu")
    assert liger.unsupported(device_type="cuda", dtype="bfloat16") is None
    assert "float64" in str(liger.unsupported(device_type="cuda", dtype="float64"))
    monkeypatch.delitem(sys.modules, "liger_kernel")
    assert "pip install 'longctx[liger]'" in str(liger.unsupported(device_type="cuda", dtype="bfloat16"))
    with pytest.raises(ValueError, match="model.ops=apex is not known; known are torch, liger"):
        load_config(["model.ops=apex"])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_on_a_device(dtype: torch.dtype) -> None:
    pytest.importorskip("liger_kernel")
    truth = loss_and_gradients("torch", torch.float64)
    plain, ours = (loss_and_gradients(ops, dtype, "cuda") for ops in ("torch", "liger"))
    for index, (a, b, ref) in enumerate(zip(ours, plain, truth, strict=True)):
        assert_within_budget(a, b, ref, factor=GRADIENT_FACTOR if index else OUTPUT_FACTOR, name=str(index))
