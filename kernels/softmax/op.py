"""Choose a softmax kernel by name: what was asked for, or an error with the reason."""

from longctx.kernels.contract import LocalKernel, Request
from longctx.kernels.softmax.aten import CpuFlash, CudaFlash
from longctx.kernels.softmax.auto_kernel import AutoKernel
from longctx.kernels.softmax.blocked import Blocked
from longctx.kernels.softmax.flash_attention_2 import FlashAttention2
from longctx.kernels.softmax.primitive import Primitive
from longctx.kernels.softmax.reference import ReferenceKernel
from longctx.kernels.softmax.torch_kernel import TorchKernel
from longctx.kernels.softmax.triton_kernel import TritonKernel

KERNELS = ("auto", "torch", "triton", "flash_attn", "reference")


def choose_primitive(request: Request) -> Primitive:
    """Return ATen's flash attention where it serves the request, else the blocked matrix products.

    They take 16-bit inputs on CPU too: ATen rounds every partial result there, and takes longer (docs/numerics.md).
    """
    library: Primitive = CudaFlash() if request.device_type == "cuda" else CpuFlash()
    rounds = request.device_type == "cpu" and request.dtype.itemsize == 2
    return Blocked() if rounds or library.unsupported(request) is not None else library


def resolve_kernel(name: str, request: Request) -> LocalKernel:
    """Return the kernel that serves `request`.

    Args:
        name: `torch` (ATen's flash attention and blocks of matrix products), `triton`, `flash_attn` (the package),
            `reference` (everything, slowly), or `auto`: on a GPU `triton`, and flash-attn or ATen's flash attention for
            hops that are one plain rectangle; elsewhere `torch`; for predicates `reference`.

    Raises:
        ValueError: an unknown name, or a named kernel that cannot serve the request (with its reason).
    """
    if name not in KERNELS:
        raise ValueError(f"attention.kernel={name} is not known; known are {', '.join(KERNELS)}")
    candidates: dict[str, LocalKernel] = {
        "torch": TorchKernel(choose_primitive(request)),
        "triton": TritonKernel(),
        "flash_attn": TorchKernel(FlashAttention2(), name="flash_attn"),
        "reference": ReferenceKernel(),
    }
    serving = {key: kernel for key, kernel in candidates.items() if kernel.unsupported(request) is None}
    if name == "auto":
        return _automatic(serving, request)
    if name not in serving:
        reason = candidates[name].unsupported(request)
        raise ValueError(
            f"attention.kernel={name} cannot serve this: {reason}; set attention.kernel={'|'.join(serving)}"
        )
    return serving[name]


def _automatic(serving: dict[str, LocalKernel], request: Request) -> LocalKernel:
    if request.device_type != "cuda" or "triton" not in serving:
        return serving.get("torch", serving["reference"])
    if "flash_attn" in serving:
        return AutoKernel(serving["flash_attn"], serving["triton"])
    # ATen's flash attention, not what stands in for it where it has no softcap, float32 or unequal head dims.
    library = CudaFlash().unsupported(request) is None and request.dtype.itemsize == 2
    return AutoKernel(serving["torch"], serving["triton"]) if library else serving["triton"]
