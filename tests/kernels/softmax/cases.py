"""Whole-sequence attention through a local kernel, and the dense yardstick beside it: out, lse, dq, dk, dv."""

import torch
from torch import Tensor

from longctx.kernels.contract import LocalKernel, Request, Scores, whole
from longctx.kernels.mask import Mask, causal, documents, full, sliding_window
from longctx.kernels.merge import empty_partial
from longctx.kernels.positions import Segment, Tile, cut
from longctx.kernels.softmax.delta import row_delta
from longctx.kernels.softmax.reference import dense_attention
from longctx.kernels.tiles import tiles_between
from tests.support.tolerance import GRADIENT_FACTOR, OUTPUT_FACTOR, assert_within_budget, max_error

T = 67
MASKS = {
    "full": full(),
    "causal": causal(),
    "window": sliding_window(9),
    "two_sided": sliding_window(3, 2),
    "documents": documents((0, 1, 30, 31, 67)) & causal(),
}
HEADS = [(4, 4), (4, 2), (6, 1)]


def inputs(
    heads: int,
    kv_heads: int,
    dtype: torch.dtype,
    *,
    head_dim: int = 16,
    v_head_dim: int | None = None,
    tokens: int = T,
    batch: int = 2,
) -> list[Tensor]:
    """Return random q, k, v, dout."""
    generator = torch.Generator().manual_seed(heads * 10 + kv_heads)
    v_dim = head_dim if v_head_dim is None else v_head_dim
    dims = [(heads, head_dim), (kv_heads, head_dim), (kv_heads, v_dim), (heads, v_dim)]
    return [torch.randn(batch, tokens, *dim, generator=generator, dtype=torch.float64).to(dtype) for dim in dims]


def request(q: Tensor, k: Tensor, v: Tensor, *, softcap: float | None = None) -> Request:
    """Return what the tensors ask of a kernel."""
    return Request(
        device_type=q.device.type,
        dtype=q.dtype,
        head_dim=q.shape[-1],
        v_head_dim=v.shape[-1],
        num_heads=q.shape[2],
        num_kv_heads=k.shape[2],
        softcap=softcap is not None,
    )


def tiles_of(mask: Mask, tokens: int) -> tuple[Tile, ...]:
    """Return the tiles of one rank that has all tokens."""
    whole = cut((Segment(0, 1, tokens),), mask.bounds(tokens))
    return tiles_between(whole, whole, mask=mask, total=tokens)


def run(
    kernel: LocalKernel, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, mask: Mask, *, softcap: float | None = None
) -> list[Tensor]:
    """Return a kernel's out and lse (float32 or float64) and dq, dk, dv."""
    work = whole(tiles_of(mask, q.shape[1]), heads=q.shape[2], kv_heads=k.shape[2])
    scores = Scores(softmax_scale=q.shape[-1] ** -0.5, softcap=softcap)
    partial = empty_partial(q, v_head_dim=v.shape[-1])
    kernel.forward(q, k, v, work=work, scores=scores, partial=partial)
    dq, dk, dv = (torch.zeros(x.shape, dtype=partial.out.dtype, device=x.device) for x in (q, k, v))
    delta = row_delta(dout, partial.out.to(q.dtype))
    kernel.backward(q, k, v, work=work, scores=scores, dout=dout, delta=delta, lse=partial.lse, dq=dq, dk=dk, dv=dv)
    return [partial.out, partial.lse, dq, dk, dv]


def dense(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, mask: Mask, *, softcap: float | None = None) -> list[Tensor]:
    """Return the same by dense attention and autograd, in the dtype given."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    positions = torch.arange(q.shape[1], device=q.device)
    out, lse = dense_attention(q, k, v, allowed=mask.allowed(positions, positions), softcap=softcap)
    return [out.detach(), lse.detach(), *torch.autograd.grad(out, (q, k, v), dout)]


def largest_error(got: list[Tensor], want: list[Tensor]) -> float:
    """Return the largest error of all five results; NaN if there is one. Equal infinities are no error."""
    return torch.tensor([max_error(a, b) for a, b in zip(got, want, strict=True)]).max().item()


def assert_low_precision(kernel: LocalKernel, args: list[Tensor], mask: Mask, *, softcap: float | None = None) -> None:
    """Apply the rule for low precision to all five results."""
    got, plain = run(kernel, *args, mask, softcap=softcap), dense(*args, mask, softcap=softcap)
    truth = dense(*(x.double() for x in args), mask, softcap=softcap)
    assert_within_budgets(got, plain, truth)


def assert_within_budgets(got: list[Tensor], plain: list[Tensor], truth: list[Tensor]) -> None:
    """Assert the same of out, lse, dq, dk, dv that are there."""
    for index, name in enumerate(("out", "lse", "dq", "dk", "dv")):
        factor = OUTPUT_FACTOR if index < 2 else GRADIENT_FACTOR
        assert_within_budget(got[index], plain[index], truth[index], factor=factor, name=name)


def poisoned(x: Tensor, *, last_stride: int) -> Tensor:
    """Return x as a part of a larger tensor full of NaN: odd strides, poisonous neighbours."""
    box = torch.full((x.shape[0], x.shape[1] + 3, x.shape[2] + 1, x.shape[3] + 2, last_stride), torch.nan).to(x.dtype)
    inner = box[:, 1 : x.shape[1] + 1, 1:, : x.shape[3], 0]
    inner.copy_(x)
    assert inner.stride(-1) == last_stride
    return inner
