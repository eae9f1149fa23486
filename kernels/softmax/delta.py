"""`delta = rowsum(dout * out)`, and an `out` made up from it for library kernels that insist on forming it themselves.

The gradient of the scores is `ds = p * (dout v^T - delta)`: a backward needs nothing else of `out`, and library
backwards read `out` for delta only. A schedule that moves queries can so send delta, one number per row, and not out.
"""

import torch
from torch import Tensor

from longctx.kernels.merge import accumulator_dtype


def row_delta(dout: Tensor, out: Tensor) -> Tensor:
    """Return rowsum(dout * out) of `[B, T, H, Dv]` tensors as `[B, H, T]` in the accumulators' dtype."""
    wide = accumulator_dtype(dout.dtype)
    return (dout.to(wide) * out.to(wide)).sum(-1).transpose(1, 2).contiguous()


def stand_in_out(dout: Tensor, delta: Tensor) -> Tensor:
    """Return an `out` in dout's dtype with rowsum(dout * out) == delta: zero but for a dim or two of each row.

    `delta / dout[j]` at the dim j where |dout| is largest is at most the sum of |out| over its dims, so it does not
    overflow where out did not. In 16 bits the rounding of one number would be worse than that of a real out, whose Dv
    rounding errors average out (docs/numerics.md), so what it leaves goes to the second largest dim.

    Args:
        dout: `[B, T, H, Dv]`; a row of zeros gives zeros.
        delta: `[B, H, T]`, float32 or float64.
    """
    rest = delta.transpose(1, 2).unsqueeze(-1)
    out = torch.zeros_like(dout)
    count = 2 if dout.element_size() < 4 else 1
    dims = dout.abs().topk(min(count, dout.shape[-1]), dim=-1).indices
    largest = dout.gather(-1, dims[..., :1]).to(rest.dtype)
    for i in range(dims.shape[-1]):
        dim = dims[..., i : i + 1]
        factor = dout.gather(-1, dim).to(rest.dtype)
        # A second dim below 1/256 of the first could need more than a 16-bit number holds; zero rows end here too.
        useful = (factor.abs() * 256 >= largest.abs()) & (factor != 0)
        part = torch.where(useful, rest / factor, 0).to(dout.dtype)
        out.scatter_(-1, dim, part)
        rest = rest - part.to(rest.dtype) * factor
    return out
