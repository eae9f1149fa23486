"""Row-wise operations by Liger-Kernel's fused Triton kernels (arXiv 2410.10989), where `model.ops=liger`.

The same results as torch's, in less memory: no float32 copies of norms' inputs, and gradients written where inputs
were. RoPE stays with torch, and so do norms of heads.
"""

from importlib.util import find_spec

from torch import Tensor

OPS = ("torch", "liger")


def unsupported(*, device_type: str, dtype: str) -> str | None:
    """Return why Liger's kernels cannot be used, or None where they can."""
    if device_type != "cuda":
        return f"Liger's kernels need a CUDA device; the run is on {device_type}"
    if find_spec("liger_kernel") is None:
        return "Liger-Kernel is not installed (pip install 'longctx[liger]')"
    return "Liger's kernels compute in float32 at most; given engine.dtype=float64" if dtype == "float64" else None


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """Return x / rms(x) * weight over the last dim, rounded to x's dtype before the weight, as `norms.RMSNorm` does."""
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    # Not in place: dout may be the gradient of something else too, such as the residual stream.
    out: Tensor = LigerRMSNormFunction.apply(x, weight, eps, 0.0, "llama", False)
    return out


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up. The backward pass overwrites both: nobody else may read them."""
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    out: Tensor = LigerSiLUMulFunction.apply(gate, up)
    return out


def loss_sum(logits: Tensor, labels: Tensor, *, ignored: int) -> Tensor:
    """Return the summed cross-entropy of logits `[N, V]`, which may be overwritten, and labels `[N]`.

    In the logits' dtype, and so are the sums: they must be float32.
    """
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction

    loss: Tensor = LigerCrossEntropyFunction.apply(logits, labels, None, ignored, 0.0, 0.0, "sum")[0]
    return loss
