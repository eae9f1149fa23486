"""Choose a kernel of linear attention by name, or say why not; and the op on one device."""

import torch
from torch import Tensor

from longctx.kernels.linear.contract import LinearKernel, LinearRequest, gate_of, state_dtype, whole
from longctx.kernels.linear.reference import Reference
from longctx.kernels.linear.torch_kernel import TorchKernel

KERNELS = ("auto", "torch", "triton", "fla", "reference")


def resolve_kernel(name: str, request: LinearRequest) -> LinearKernel:
    """Return the kernel called `name` for a request.

    Raises:
        ValueError: an unknown name, or a kernel that cannot serve the request, with the reason and the alternatives.
    """
    if name not in KERNELS:
        raise ValueError(f"kernel {name!r} of linear attention is not known; known are {', '.join(KERNELS)}")
    kernel = _automatic(request) if name == "auto" else _named(name)
    reason = kernel.unsupported(request)
    if reason is not None:
        raise ValueError(
            f"kernel {kernel.name} cannot serve this linear attention: {reason}. kernel=torch with chunk_size null "
            "serves every kind on any device; auto takes triton where it can"
        )
    return kernel


def _named(name: str) -> LinearKernel:
    """Return a kernel; those that need a package of their own are imported only now."""
    if name == "triton":
        from longctx.kernels.linear.triton_kernel import TritonKernel

        return TritonKernel()
    if name == "fla":
        from longctx.kernels.linear.fla_kernel import FlaKernel

        return FlaKernel()
    return TorchKernel() if name == "torch" else Reference()


def _automatic(request: LinearRequest) -> LinearKernel:
    """Return Triton's kernels on a GPU where they serve the request, else plain torch."""
    if request.device_type == "cuda":
        triton = _named("triton")
        if triton.unsupported(request) is None:
            return triton
    return TorchKernel()


def linear_request(
    q: Tensor, k: Tensor, v: Tensor, *, g: Tensor | None, beta: Tensor | None, chunk_size: int | None
) -> LinearRequest:
    """Check the tensors of a call against each other and return what it asks for."""
    if not (q.dim() == k.dim() == v.dim() == 4 and q.shape == k.shape and v.shape[:3] == q.shape[:3]):
        raise ValueError(
            f"q, k must be [B, T, H, K] and v [B, T, H, V]; given {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if len({q.dtype, k.dtype, v.dtype}) != 1 or not q.dtype.is_floating_point:
        raise ValueError(f"q, k, v must have one floating-point dtype; given {q.dtype}, {k.dtype}, {v.dtype}")
    if g is not None and g.shape not in (q.shape[2:3], q.shape[:3], q.shape):
        batch, tokens, heads, size = q.shape
        raise ValueError(
            f"g must be [H] = [{heads}], [B, T, H] = [{batch}, {tokens}, {heads}] or [B, T, H, K] with K = {size}; "
            f"given {tuple(g.shape)}"
        )
    if g is not None and g.dtype != state_dtype(q):
        raise ValueError(f"g must be {state_dtype(q)}, since decays are never 16-bit; given {g.dtype}")
    if g is not None and g.device.type == "cpu" and bool((g.detach() > 0).any()):  # on a GPU it would have to wait
        raise ValueError(f"g are log decays and must be <= 0; given up to {g.max().item():.3g}")
    if beta is not None and beta.shape != q.shape[:3]:
        raise ValueError(f"beta must be [B, T, H] = {tuple(q.shape[:3])}; given {tuple(beta.shape)}")
    if beta is not None and beta.dtype not in (q.dtype, state_dtype(q)):
        raise ValueError(f"beta must be {q.dtype} as q, or {state_dtype(q)}; given {beta.dtype}")
    elsewhere = next((x.device for x in (k, v, g, beta) if x is not None and x.device != q.device), None)
    if elsewhere is not None:
        raise ValueError(f"q, k, v, g, beta must be on one device; given {q.device} and {elsewhere}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be >= 1 or None; given {chunk_size}")
    return LinearRequest(
        device_type=q.device.type,
        dtype=q.dtype,
        gate=gate_of(g),
        delta=beta is not None,
        key_dim=q.shape[-1],
        value_dim=v.shape[-1],
        chunk_size=chunk_size,
    )


def check_initial_state(initial_state: Tensor | None, *, q: Tensor, v: Tensor) -> None:
    """Refuse a state `[B, H, K, V]` that does not fit q `[B, T, H, K]` and v `[B, T, H, V]`."""
    expected = (q.shape[0], q.shape[2], q.shape[3], v.shape[3])
    if initial_state is not None and initial_state.shape != expected:
        raise ValueError(f"initial_state must be [B, H, K, V] = {expected}; given {tuple(initial_state.shape)}")


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    g: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: tuple[int, ...] | None = None,
    chunk_size: int | None = None,
    kernel: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Compute linear attention of whole sequences on one device; see `contract.py` for the formula and the kinds.

    Args:
        q, k: `[B, T, H, K]`.
        v: `[B, T, H, V]`.
        g: log decays <= 0: None, `[H]`, `[B, T, H]` or `[B, T, H, K]`; float32 (float64 for float64 inputs).
        beta: `[B, T, H]`: the delta rule; None = without.
        scale: of q; default `K ** -0.5`.
        initial_state: `[B, H, K, V]` before the first token; later documents of a packed sequence start from 0.
        cu_seqlens: bounds of packed documents, 0 ... T, the same for all rows; None = one document.
        chunk_size: tokens that are computed together; None = the kernel's own choice.
        kernel: `auto` or a name of `KERNELS`.

    Returns:
        out `[B, T, H, V]` in q's dtype; the final state `[B, H, K, V]`, float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes or dtypes that do not fit, or a kernel that cannot serve the request.
    """
    request = linear_request(q, k, v, g=g, beta=beta, chunk_size=chunk_size)
    check_initial_state(initial_state, q=q, v=v)
    cuts, chosen = whole(q.shape[1], cu_seqlens, q.device), resolve_kernel(kernel, request)
    with torch.autocast(q.device.type, enabled=False):  # it would round what is kept in float32 to 16 bits
        work = chosen.begin(
            q,
            k,
            v,
            g=g,
            beta=beta,
            scale=q.shape[-1] ** -0.5 if scale is None else scale,
            cuts=cuts,
            chunk_size=chunk_size,
        )
        states = None if initial_state is None else initial_state.to(state_dtype(q))[:, None]
        out, final = work.finish(states)
    return out, final[:, 0]
