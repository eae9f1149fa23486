"""Compile recorded launches for an architecture that need not be there, and read what the binary says.

Triton's own compiler takes an explicit target. Its cubin says how many registers a kernel takes and whether some were
spilled to local memory; the ptx says whether products run on the matrix unit.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from longctx.kernels.triton_common.launch import Launch

# Bytes of shared memory that one program may have: CUDA's programming guide, table of compute capabilities.
SHARED_LIMITS = {"sm_80": 163 * 1024, "sm_86": 99 * 1024, "sm_90": 227 * 1024}
MATRIX_UNIT = re.compile(r"\b(wgmma|mma)\.(?:mma_async\.)?sync")
_TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}


@dataclass(frozen=True)
class Binary:
    """What was compiled.

    Attributes:
        registers: per thread.
        stack, local: bytes per thread in local memory: a stack, and spilled registers.
        shared: bytes of shared memory per program.
        matrix_unit: `wgmma`, `mma`, or empty where no product runs on the matrix unit.
        dots: matrix products in Triton's own intermediate code.
    """

    registers: int
    stack: int
    local: int
    shared: int
    matrix_unit: str
    dots: int


def compile_launch(launch: Launch, arch: str) -> Binary:
    """Compile a recorded launch for `sm_80` or `sm_90`.

    Raises:
        RuntimeError: Triton's functions were decorated for its interpreter.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if not isinstance(launch.kernel, triton.runtime.JITFunction):
        raise RuntimeError(f"{launch.kernel} was decorated for Triton's interpreter: nothing to compile")
    signature, constants, attributes = _specialise(launch)
    source = ASTSource(launch.kernel, signature, constants, attributes)
    target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    compiled = triton.compile(source, target=target, options=options)
    kinds = set(MATRIX_UNIT.findall(compiled.asm["ptx"]))
    usage = _usage(compiled.asm["cubin"])
    return Binary(
        registers=usage["REG"],
        stack=usage["STACK"],
        local=usage["LOCAL"],
        shared=compiled.metadata.shared,
        matrix_unit="wgmma" if "wgmma" in kinds else "mma" if "mma" in kinds else "",
        dots=compiled.asm["ttir"].count("tt.dot"),
    )


def _specialise(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], list[list[Any]]]]:
    """Return signature, constants and attributes of a launch, as Triton derives them when it launches."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    assert set(launch.arguments) == set(launch.kernel.arg_names), (launch.arguments.keys(), launch.kernel.arg_names)
    for index, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        divisible = False
        if parameter.is_constexpr or value is None or (value is True or value is False):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = "*" + _TYPES[value.dtype]
            divisible = value.data_ptr() % 16 == 0
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value == 1 and not parameter.do_not_specialize:
            signature[name], constants[name] = "constexpr", 1
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            divisible = value % 16 == 0 and not parameter.do_not_specialize
        if divisible:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def _usage(cubin: bytes) -> dict[str, int]:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [str(tool), "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", text)}
