"""Choose a kernel of sparse attention by name: what was asked for, or an error with the reason."""

from longctx.kernels.block_sparse.contract import SparseKernel, Weights
from longctx.kernels.block_sparse.reference_kernel import ReferenceSparseKernel
from longctx.kernels.block_sparse.torch_kernel import TorchSparseKernel
from longctx.kernels.contract import Request

KERNELS = ("auto", "torch", "reference")


def resolve_kernel(name: str, request: Request, weights: Weights) -> SparseKernel:
    """Return the kernel that serves `request` with `weights`.

    Args:
        name: `torch` (gathered matrix products, everything), `reference` (everything, densely), or `auto`: `torch`.

    Raises:
        ValueError: an unknown name, or a named kernel that cannot serve the request (with its reason). They speak of
            `kernel=`; the caller knows whose config key that is.
    """
    if name not in KERNELS:
        raise ValueError(f"kernel={name} is not known; known are {', '.join(KERNELS)}")
    kernel: SparseKernel = ReferenceSparseKernel() if name == "reference" else TorchSparseKernel()
    return kernel
