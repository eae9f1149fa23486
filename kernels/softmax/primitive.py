"""What computes one rectangle: ATen's flash attention (`aten.py`), flash-attn's, or `blocked.py`."""

from typing import Protocol

from torch import Tensor

from longctx.kernels.contract import Request, Scores
from longctx.kernels.softmax.rectangles import Rectangle


def refused_head_dims(request: Request, who: str) -> str | None:
    """Return why CUDA's flash attentions do not take a request's head dims, or None where they do."""
    if request.head_dim == request.v_head_dim and request.head_dim % 8 == 0 and request.head_dim <= 256:
        return None
    return (
        f"{who} needs equal head dims for q and v, a multiple of 8 and at most 256; "
        f"given {request.head_dim} and {request.v_head_dim}"
    )


class Primitive(Protocol):
    """One rectangle's attention: a row of it sees at least one of its keys.

    `square_causal` and `high_bands` say which rectangles it wants (`rectangles.rectangles`).
    """

    name: str
    square_causal: bool
    high_bands: bool

    def unsupported(self, request: Request) -> str | None: ...

    def row_term(self, dout: Tensor, delta: Tensor) -> Tensor:
        """Return delta `[B, H, T]` in the form that `backward` takes, tokens in dim 1: once for all rectangles."""
        ...

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, shape: Rectangle, scores: Scores) -> tuple[Tensor, Tensor]:
        """Return out `[B, n, H, Dv]`, in q's dtype or wider, and lse `[B, H, n]`, float32 (float64 for float64).

        Args:
            q: `[B, n, H, D]`, the rectangle's rows; k: `[B, m, HK, D]` and v: `[B, m, HK, Dv]`, its columns.
        """
        ...

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
        """Return dq, dk, dv, in q's dtype or wider.

        Args:
            dout: `[B, n, H, Dv]`.
            row_term: the rows of what `row_term` returned.
            lse: `[B, H, n]`, of all hops.
        """
        ...
