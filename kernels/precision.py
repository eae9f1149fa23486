"""Arithmetic in the dtypes given, whatever autocast is on."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def without_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """Run without autocast, which would round what is kept in float32 to 16 bits; for the backward of a Function too,
    since that runs under whatever autocast `backward()` was called in."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return function(*args, **kwargs)

    return run


def in_full_float32(function: Callable[P, R]) -> Callable[P, R]:
    """Run with float32 matrix products in float32, whatever `torch.set_float32_matmul_precision` allows: TF32 keeps 11
    digits of 24, in which other blocks are the best."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        before = torch.get_float32_matmul_precision()
        if before == "highest":
            return function(*args, **kwargs)
        torch.set_float32_matmul_precision("highest")
        try:
            return function(*args, **kwargs)
        finally:
            torch.set_float32_matmul_precision(before)

    return run
