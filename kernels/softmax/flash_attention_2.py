"""The flash-attn package, version 2, as a primitive: (q, k, v, mask kind) -> (out, lse) and its backward, on CUDA.

Its causal mask and its windows are aligned to the bottom right corner; a window (left, right) lets row i of n see the
columns from i + m - n - left to i + m - n + right of m. Grouped K/V and softcaps are its own. It rounds out, dq, dk and
dv of a rectangle to the input dtype.
"""

from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

from longctx.kernels.contract import Request, Scores
from longctx.kernels.softmax.delta import stand_in_out
from longctx.kernels.softmax.primitive import refused_head_dims
from longctx.kernels.softmax.rectangles import Rectangle

INSTALL = "pip install flash-attn --no-build-isolation"
OLDEST, NEWEST = (2, 7, 3), (2, 9)


class FlashAttention2:
    """flash-attn's `_flash_attn_forward` and `_flash_attn_backward`, deterministic; see `primitive.Primitive`."""

    name = "flash_attn"
    square_causal = True
    high_bands = True

    def unsupported(self, request: Request) -> str | None:
        if request.device_type != "cuda":
            return f"flash-attn needs a CUDA device; the tensors are on {request.device_type}"
        reason = _missing()
        if reason is not None:
            return reason
        if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
            return "flash-attn needs a GPU of compute capability 8.0 or later"
        if request.dtype not in (torch.bfloat16, torch.float16):
            return f"flash-attn takes bfloat16 and float16; given {request.dtype}"
        return refused_head_dims(request, "flash-attn")

    def row_term(self, dout: Tensor, delta: Tensor) -> Tensor:
        return stand_in_out(dout, delta)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, shape: Rectangle, scores: Scores) -> tuple[Tensor, Tensor]:
        from flash_attn.flash_attn_interface import _flash_attn_forward

        left, right = _window(shape)
        out, lse, *_ = _flash_attn_forward(
            q,
            k,
            v,
            dropout_p=0.0,
            softmax_scale=scores.softmax_scale,
            causal=shape.kind == "causal",
            window_size_left=left,
            window_size_right=right,
            softcap=scores.softcap or 0.0,
            alibi_slopes=None,
            return_softmax=False,
        )
        return out, lse[:, :, : q.shape[1]]

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
        from flash_attn.flash_attn_interface import _flash_attn_backward

        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        left, right = _window(shape)
        _flash_attn_backward(
            dout.contiguous(),
            q,
            k,
            v,
            row_term.contiguous(),
            lse.contiguous(),
            dq,
            dk,
            dv,
            dropout_p=0.0,
            softmax_scale=scores.softmax_scale,
            causal=shape.kind == "causal",
            window_size_left=left,
            window_size_right=right,
            softcap=scores.softcap or 0.0,
            alibi_slopes=None,
            deterministic=True,
        )
        return dq, dk, dv


def _missing() -> str | None:
    """Return why the package is not there; others have its name for a folder of theirs."""
    try:
        found = version("flash-attn")
    except PackageNotFoundError:
        return f"flash-attn is not installed ({INSTALL})"
    numbers = tuple(int(part) for part in found.split("+")[0].split(".")[:3] if part.isdigit())
    if not OLDEST <= numbers < NEWEST:
        return f"flash-attn 2.7.3 to 2.8 is needed; {found} is installed"
    return None


def _window(shape: Rectangle) -> tuple[int, int]:
    """Return (left, right) of a rectangle, (-1, -1) for none; both ends of a band meet the last row (`rectangles`)."""
    if shape.kind != "band":
        return -1, -1
    corner = shape.k_count - shape.q_count
    assert shape.lo <= corner <= shape.hi, shape
    return corner - shape.lo, shape.hi - corner
