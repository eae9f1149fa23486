"""Choose a softmax kernel by name: what was asked for, or an error with the reason."""

from longctx.kernels.contract import LocalKernel, Request
from longctx.kernels.softmax.aten import CpuFlash, CudaFlash
from longctx.kernels.softmax.blocked import Blocked
from longctx.kernels.softmax.primitive import Primitive
from longctx.kernels.softmax.reference import ReferenceKernel
from longctx.kernels.softmax.torch_kernel import TorchKernel

KERNELS = ("auto", "torch", "reference")


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
        name: `torch` (everything but predicates), `reference`, or `auto` (the first that serves the request, in that
            order).

    Raises:
        ValueError: an unknown name, or a named kernel that cannot serve the request (with its reason).
    """
    if name not in KERNELS:
        raise ValueError(f"attention.kernel={name} is not known; known are {', '.join(KERNELS)}")
    candidates: dict[str, LocalKernel] = {
        "torch": TorchKernel(choose_primitive(request)),
        "reference": ReferenceKernel(),
    }
    if name == "auto":
        return next(kernel for kernel in candidates.values() if kernel.unsupported(request) is None)
    reason = candidates[name].unsupported(request)
    if reason is not None:
        others = [key for key, kernel in candidates.items() if kernel.unsupported(request) is None]
        raise ValueError(
            f"attention.kernel={name} cannot serve this: {reason}; set attention.kernel={'|'.join(others)}"
        )
    return candidates[name]
