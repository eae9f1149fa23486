"""ATen's flash attention as primitives: (q, k, v, mask kind) -> (out, lse) and its backward, on CPU and CUDA.

All tensors are `[B, T, H, D]`; ATen wants `[B, H, T, D]` and honours strides, so a transposed view costs nothing.
"""

from functools import lru_cache

import torch
from torch import Tensor

from longctx.kernels.contract import Request, Scores
from longctx.kernels.softmax.delta import stand_in_out
from longctx.kernels.softmax.primitive import refused_head_dims
from longctx.kernels.softmax.rectangles import Rectangle

aten = torch.ops.aten


def bias(shape: Rectangle, *, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """Return the additive bias of a `band` rectangle `[q_count, k_count]`, or None for the other kinds."""
    if shape.kind != "band":
        return None
    return _bias(shape.q_count, shape.k_count, shape.lo, shape.hi, dtype, str(device))


@lru_cache(maxsize=64)
def _bias(rows: int, columns: int, lo: int, hi: int, dtype: torch.dtype, device: str) -> Tensor:
    i = torch.arange(rows, device=device)[:, None]
    j = torch.arange(columns, device=device)[None, :]
    hidden = (j - i < lo) | (j - i > hi)
    # Rows of 16-byte multiples: the memory-efficient CUDA kernel wants an aligned bias.
    padded = torch.zeros(rows, -(-columns // 16) * 16, dtype=dtype, device=device)
    return padded[:, :columns].masked_fill_(hidden, float("-inf"))


class CpuFlash:
    """`_scaled_dot_product_flash_attention_for_cpu`: float64, float32, bfloat16, float16; GQA without repeated K/V.

    Its causal mask is aligned to the top left corner for any shape; its lse is float32 (float64 for float64).
    """

    name = "torch:CpuFlash"
    square_causal = False
    high_bands = False

    def unsupported(self, request: Request) -> str | None:
        if request.softcap:
            return "ATen's flash attention has no softcap"
        if request.head_dim != request.v_head_dim:
            given = f"given {request.head_dim} and {request.v_head_dim}"
            return f"ATen's CPU flash attention needs equal head dims for q and v; {given}"
        return None

    def row_term(self, dout: Tensor, delta: Tensor) -> Tensor:
        return stand_in_out(dout, delta)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, shape: Rectangle, scores: Scores) -> tuple[Tensor, Tensor]:
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            0.0,
            shape.kind == "causal",
            attn_mask=bias(shape, dtype=q.dtype, device=q.device),
            scale=scores.softmax_scale,
        )
        return out.transpose(1, 2), lse

    def backward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        shape: Rectangle,
        scores: Scores,
        dout: Tensor,
        row_term: Tensor,
        lse: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout.transpose(1, 2),
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            row_term.transpose(1, 2),
            lse,
            0.0,
            shape.kind == "causal",
            attn_mask=bias(shape, dtype=q.dtype, device=q.device),
            scale=scores.softmax_scale,
        )
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


class CudaFlash:
    """ATen's CUDA kernels: flash attention for 16-bit full and causal rectangles, memory-efficient for the others.

    Flash attention aligns a causal mask to the bottom right corner, so only square causal rectangles are asked for. It
    reads grouped K/V itself; for the memory-efficient kernel (float32 and windows) one rectangle's K/V are repeated.
    """

    name = "torch:CudaFlash"
    square_causal = True
    high_bands = False

    def unsupported(self, request: Request) -> str | None:
        if request.softcap:
            return "ATen's flash attention has no softcap"
        if request.dtype == torch.float64:
            return "ATen has no float64 attention on CUDA that returns the lse"
        return refused_head_dims(request, "ATen's CUDA flash attention")

    def row_term(self, dout: Tensor, delta: Tensor) -> Tensor:
        return stand_in_out(dout, delta)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, shape: Rectangle, scores: Scores) -> tuple[Tensor, Tensor]:
        if _flash_serves(q, shape):
            out, lse, *_ = aten._flash_attention_forward(
                q,
                k,
                v,
                None,
                None,
                q.shape[1],
                k.shape[1],
                0.0,
                shape.kind == "causal",
                False,
                scale=scores.softmax_scale,
            )
            return out, lse[:, :, : q.shape[1]]
        group = q.shape[2] // k.shape[2]
        out, lse, *_ = aten._scaled_dot_product_efficient_attention(
            q.transpose(1, 2),
            _expanded(k, group).transpose(1, 2),
            _expanded(v, group).transpose(1, 2),
            _expanded_bias(shape, q),
            True,
            0.0,
            shape.kind == "causal",
            scale=scores.softmax_scale,
        )
        return out.transpose(1, 2), lse[:, :, : q.shape[1]]

    def backward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        shape: Rectangle,
        scores: Scores,
        dout: Tensor,
        row_term: Tensor,
        lse: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device)
        if _flash_serves(q, shape):
            return aten._flash_attention_backward(
                dout.contiguous(),
                q,
                k,
                v,
                row_term.contiguous(),
                lse.contiguous(),
                None,
                None,
                q.shape[1],
                k.shape[1],
                0.0,
                shape.kind == "causal",
                no_dropout,
                no_dropout[0],
                scale=scores.softmax_scale,
            )
        group = q.shape[2] // k.shape[2]
        # The kernel reads lse in rows padded to a multiple of 32.
        padded = torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32)).contiguous()
        seed = torch.zeros((), dtype=torch.int64, device=q.device)
        dq, dk, dv, _ = aten._scaled_dot_product_efficient_attention_backward(
            dout.transpose(1, 2),
            q.transpose(1, 2),
            _expanded(k, group).transpose(1, 2),
            _expanded(v, group).transpose(1, 2),
            _expanded_bias(shape, q),
            row_term.transpose(1, 2),
            padded,
            seed,
            seed,
            0.0,
            [True, True, True, False],
            shape.kind == "causal",
            scale=scores.softmax_scale,
        )
        dk = dk.transpose(1, 2).unflatten(2, (-1, group)).sum(3, dtype=torch.float32)
        dv = dv.transpose(1, 2).unflatten(2, (-1, group)).sum(3, dtype=torch.float32)
        return dq.transpose(1, 2), dk, dv


def _flash_serves(q: Tensor, shape: Rectangle) -> bool:
    return q.dtype in (torch.float16, torch.bfloat16) and shape.kind != "band"


def _expanded(kv: Tensor, group: int) -> Tensor:
    return kv if group == 1 else kv.repeat_interleave(group, dim=2)


def _expanded_bias(shape: Rectangle, q: Tensor) -> Tensor | None:
    band = bias(shape, dtype=q.dtype, device=q.device)
    return None if band is None else band.expand(q.shape[0], q.shape[2], -1, -1)
