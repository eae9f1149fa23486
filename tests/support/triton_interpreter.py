"""Make Triton's interpreter compute bfloat16 as devices do.

It keeps bfloat16 as 16-bit integers. Its `dot` multiplies these (Triton 3.7), and its conversion from float32 cuts
digits off instead of rounding to nearest even.
"""

from typing import Any

import numpy as np
import torch


def repair() -> None:
    """Replace both by what torch does; for the process, whose Triton must be in interpreter mode."""
    import triton.language as tl
    from triton.runtime import interpreter

    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def convert_float(data: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
        if (source, target) == (tl.float32, tl.bfloat16):
            narrow = torch.from_numpy(np.ascontiguousarray(data, dtype=np.float32)).bfloat16()
            return narrow.view(torch.int16).numpy().view(np.uint16)
        if (source, target) == (tl.bfloat16, tl.float32):
            return (np.ascontiguousarray(data).astype(np.uint32) << 16).view(np.float32)
        result: np.ndarray = convert(data, source, target, rounding)
        return result

    def create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        wide = [
            interpreter.TensorHandle(convert_float(x.data, tl.bfloat16, tl.float32, None), tl.float32)
            if x.dtype.scalar == tl.bfloat16
            else x
            for x in (a, b)
        ]
        return dot(self, *wide, d, input_precision, max_num_imprecise_acc)

    interpreter._convert_float = convert_float
    interpreter.InterpreterBuilder.create_dot = create_dot
