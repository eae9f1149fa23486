"""Choose a kernel of sparse attention by name: what was asked for, or an error with the reason."""

from longctx.kernels.block_sparse.contract import SparseKernel, Weights
from longctx.kernels.block_sparse.reference_kernel import ReferenceSparseKernel
from longctx.kernels.block_sparse.torch_kernel import TorchSparseKernel
from longctx.kernels.block_sparse.triton_kernel import TritonSparseKernel
from longctx.kernels.contract import Request

KERNELS = ("auto", "torch", "triton", "reference")


def resolve_kernel(name: str, request: Request, weights: Weights) -> SparseKernel:
    """Return the kernel that serves `request` with `weights`.

    Args:
        name: `torch` (gathered matrix products, everything), `triton`, `reference` (everything, densely), or `auto`:
            on a GPU `triton` where it serves, else `torch`.

    Raises:
        ValueError: an unknown name, or a named kernel that cannot serve the request (with its reason). They speak of
            `kernel=`; the caller knows whose config key that is.
    """
    if name not in KERNELS:
        raise ValueError(f"kernel={name} is not known; known are {', '.join(KERNELS)}")
    candidates: dict[str, SparseKernel] = {
        "torch": TorchSparseKernel(),
        "triton": TritonSparseKernel(),
        "reference": ReferenceSparseKernel(),
    }
    serving = {key: kernel for key, kernel in candidates.items() if kernel.unsupported(request, weights) is None}
    if name == "auto":
        return serving["triton"] if request.device_type == "cuda" and "triton" in serving else serving["torch"]
    if name not in serving:
        reason = candidates[name].unsupported(request, weights)
        raise ValueError(f"kernel={name} cannot serve this: {reason}; set kernel={'|'.join(serving)}")
    return serving[name]
