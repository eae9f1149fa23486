"""Forward and backward passes of one hop: our kernels, torch's backends, flex_attention and flash-attn."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from _softmax_problems import Problem
from torch import Tensor

from longctx.kernels.contract import LocalKernel, Request, Scores, whole
from longctx.kernels.merge import empty_partial
from longctx.kernels.softmax.delta import row_delta
from longctx.kernels.softmax.op import resolve_kernel
from longctx.kernels.softmax.triton.tile_table import Entry, SoftmaxTable, table_of
from longctx.kernels.softmax.triton_kernel import TritonKernel
from longctx.kernels.triton_common.tile_table import arch_of

OURS = ("auto", "triton", "torch")
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]  # q, k, v, dout: [B, T, H, D]


class KernelPass:
    """One of our kernels on one hop, from an empty partial to gradients in the inputs' dtype."""

    def __init__(self, kernel: LocalKernel, problem: Problem, inputs: Inputs) -> None:
        self.kernel, self.inputs = kernel, inputs
        q, k, _, _ = inputs
        self.scores = Scores(softmax_scale=q.shape[-1] ** -0.5)
        self.work = whole(problem.tiles, heads=q.shape[2], kv_heads=k.shape[2])
        self.grads: tuple[Tensor, ...] = ()

    def forward(self) -> None:
        q, k, v, _ = self.inputs
        self.partial = empty_partial(q, v_head_dim=v.shape[-1])
        self.kernel.forward(q, k, v, work=self.work, scores=self.scores, partial=self.partial)
        self.out = self.partial.out.to(q.dtype)

    def backward(self) -> None:
        q, k, v, dout = self.inputs
        dq, dk, dv = (torch.zeros_like(x, dtype=torch.float32) for x in (q, k, v))
        rows = {"dout": dout, "delta": row_delta(dout, self.out), "lse": self.partial.lse}
        self.kernel.backward(q, k, v, work=self.work, scores=self.scores, **rows, dq=dq, dk=dk, dv=dv)
        self.grads = tuple(x.to(q.dtype) for x in (dq, dk, dv))


class OpPass:
    """A differentiable function of q, k, v `[B, T, H, D]`."""

    def __init__(self, op: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: Inputs) -> None:
        self.op, self.dout = op, inputs[3]
        self.leaves = [x.detach().requires_grad_() for x in inputs[:3]]
        self.grads: tuple[Tensor, ...] = ()

    def forward(self) -> None:
        self.out = self.op(*self.leaves)

    def backward(self) -> None:
        self.grads = torch.autograd.grad(self.out, self.leaves, self.dout)


def make_inputs(problem: Problem, heads: int, kv_heads: int, size: int, device: torch.device) -> Inputs:
    """Return random tensors, bfloat16 on a GPU and float32 on a CPU."""
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16

    def normal(count: int) -> Tensor:
        shape = (1, problem.tokens, count, size)
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    return normal(heads), normal(kv_heads), normal(kv_heads), normal(heads)


def columns(problem: Problem, inputs: Inputs, *, programs: list[int]) -> tuple[dict[str, Any], list[str]]:
    """Return what can compute a problem, by name, and for what cannot, why not.

    Args:
        programs: persistent grids of the Triton kernels to try beside the committed ones, per multiprocessor.
    """
    q, k, v, _ = inputs
    request = Request(
        device_type=q.device.type,
        dtype=q.dtype,
        head_dim=q.shape[-1],
        v_head_dim=v.shape[-1],
        num_heads=q.shape[2],
        num_kv_heads=k.shape[2],
    )
    found: dict[str, Any] = {}
    missing: list[str] = []
    for name in OURS:
        try:
            found[name] = KernelPass(resolve_kernel(name, request), problem, inputs)
        except ValueError as error:
            missing.append(f"{name}: {error}")
    if "triton" in found:
        for count in programs:
            kernel = TritonKernel(tiles=_persistent(table_of(arch_of(q.device)), count))
            found[f"triton, {count} programs"] = KernelPass(kernel, problem, inputs)
    for name, op in _peers(problem, inputs, missing):
        found[name] = OpPass(op, inputs)
    return found, missing


def _persistent(table: SoftmaxTable, programs: int) -> SoftmaxTable:
    def changed(entry: Entry) -> Entry:
        forward, dq, dkv = (replace(x, programs=programs) for x in (entry.forward, entry.dq, entry.dkv))
        return replace(entry, forward=forward, dq=dq, dkv=dkv)

    return SoftmaxTable(table.arch, {key: changed(entry) for key, entry in table.entries.items()})


def _peers(
    problem: Problem, inputs: Inputs, missing: list[str]
) -> list[tuple[str, Callable[[Tensor, Tensor, Tensor], Tensor]]]:
    from torch.nn.attention import SDPBackend

    q, k, _, _ = inputs
    grouped = q.shape[2] != k.shape[2]
    found: list[tuple[str, Callable[[Tensor, Tensor, Tensor], Tensor]]] = []
    on_gpu = q.device.type == "cuda"
    if problem.shift is not None:
        backends = {"sdpa flash": SDPBackend.FLASH_ATTENTION, "sdpa cudnn": SDPBackend.CUDNN_ATTENTION}
        for name, backend in backends.items() if on_gpu else [("sdpa math", SDPBackend.MATH)]:
            found.append((name, partial(_sdpa, backend=backend, shift=problem.shift, grouped=grouped)))
    if not on_gpu:
        missing.append("compiled flex_attention: needs a GPU")
        return found
    found.append(("flex_attention", _flex(problem, q.device, grouped)))
    try:
        from flash_attn import flash_attn_func, flash_attn_varlen_func
    except ImportError:
        missing.append("flash-attn: not installed")
        return found
    window = (-1, -1) if problem.window is None else (problem.window - 1, 0)
    if problem.shift is not None or (problem.window is not None and problem.layout.cp == 1):
        shift = problem.shift or 0
        found.append(("flash-attn", partial(_shifted, flash_attn_func, shift=shift, window_size=window, causal=True)))
    elif problem.bounds is not None and problem.layout.cp == 1:
        cu = torch.tensor(problem.bounds, dtype=torch.int32, device=q.device)
        longest = int(cu.diff().max())

        def varlen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return flash_attn_varlen_func(q[0], k[0], v[0], cu, cu, longest, longest, causal=True)[None]

        found.append(("flash-attn", varlen))
    return found


def _shifted(op: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, *, shift: int, **options: Any) -> Tensor:
    """Compute causal attention of the rows from `shift` on to the columns that are left; the first rows see nothing."""
    if not shift:
        return op(q, k, v, **options)
    out = op(q[:, shift:], k[:, :-shift], v[:, :-shift], **options)
    return torch.nn.functional.pad(out, (0, 0, 0, 0, shift, 0))


def _sdpa(q: Tensor, k: Tensor, v: Tensor, *, backend: Any, shift: int, grouped: bool) -> Tensor:
    from torch.nn.attention import sdpa_kernel

    def op(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(backend):
            out = torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=grouped)
        return out.transpose(1, 2)

    return _shifted(op, q, k, v, shift=shift)


def _flex(problem: Problem, device: torch.device, grouped: bool) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    tokens = problem.tokens
    make = torch.compile(create_block_mask)  # uncompiled it would hold every pair of tokens
    blocks = make(problem.flex(device), None, None, tokens, tokens, device=str(device))
    compiled = torch.compile(flex_attention, dynamic=False)

    def op(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        out: Tensor = compiled(*heads_first, block_mask=blocks, enable_gqa=grouped)
        return out.transpose(1, 2)

    return op
