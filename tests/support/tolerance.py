"""The error budget of low precision: we may be at most `factor` times as far from the truth as torch is.

A tolerance picked by hand is too loose for one shape and too tight for another. The error of a plain torch computation
in the same dtype, on the same numbers, measures what that dtype can do there.
"""

import math
from collections.abc import Iterable

import torch

OUTPUT_FACTOR = 2.0
GRADIENT_FACTOR = 3.0


def max_error(actual: torch.Tensor, reference: torch.Tensor) -> float:
    """Return max|actual - reference| in float64. Equal infinities differ by 0; a NaN on either side gives NaN."""
    a, b = actual.detach().double(), reference.detach().double()
    difference = torch.where(a == b, torch.zeros_like(a), (a - b).abs())
    return difference.max().item() if difference.numel() else 0.0


def assert_within_budget(
    ours: torch.Tensor,
    torch_same_dtype: torch.Tensor,
    ref: torch.Tensor,
    *,
    factor: float = OUTPUT_FACTOR,
    name: str = "out",
    more: Iterable[tuple[torch.Tensor, torch.Tensor]] = (),
) -> None:
    """Assert `max|ours - ref| <= factor * max|torch_same_dtype - ref|`.

    Args:
        ours: what is tested.
        torch_same_dtype: the same by plain torch operations, in the dtype that `ours` was computed in.
        ref: the same by plain torch operations in float32 or float64, from the same (already rounded) inputs.
        factor: `OUTPUT_FACTOR` for outputs, `GRADIENT_FACTOR` for gradients.
        name: what to call it in the message.
        more: `(torch_same_dtype, ref)` of other draws of the problem, whose largest error counts. The largest of a few
            hundred errors is itself a matter of luck; where results are small, one draw tells too little.

    Where torch is exact we have to be exact: there is no absolute slack.
    """
    shapes = [tuple(t.shape) for t in (ours, torch_same_dtype, ref)]
    assert shapes[0] == shapes[1] == shapes[2], f"{name}: shapes differ: ours, torch, ref = {shapes}"
    assert ref.dtype in (torch.float32, torch.float64), f"{name}: the reference is {ref.dtype}, not float32 or float64"
    errors = [max_error(*draw) for draw in ((torch_same_dtype, ref), *more)]
    assert all(map(math.isfinite, errors)), f"{name}: torch itself is off by {errors}: no basis for a comparison"
    error, budget = max_error(ours, ref), factor * max(errors)
    assert error <= budget, (  # false for NaN too
        f"{name}: max error {error:.3e} is over the budget {budget:.3e} = {factor:g} x torch's error in {ours.dtype}"
    )
