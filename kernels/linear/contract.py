"""What a local kernel of linear attention is: one device's arithmetic on one rank's tokens. It never sees a rank.

All kinds are one recurrence over a state S `[K, V]` per head,

    S_t = M_t S_{t-1} + b_t k_t v_t^T,    o_t = scale q_t^T S_t,    M_t = (1 - b_t k_t k_t^T) diag(exp g_t)

with log decays g <= 0: none, one per head that is fixed, one per token and head, or one per token, head and key dim;
and with b (the delta rule) or without (then b_t k_t v_t^T is k_t v_t^T and M_t = diag(exp g_t)):

| g             | without beta                              | with beta                            |
|---------------|-------------------------------------------|--------------------------------------|
| None          | linear attention (arXiv 2006.16236)       | DeltaNet (2406.06484)                |
| `[H]`         | retention (2307.08621), lightning (2401.04658) |                                 |
| `[B, T, H]`   | simple gated, Mamba-2 (2405.21060)        | gated DeltaNet (2412.06464)          |
| `[B, T, H, K]`| GLA (2312.06635)                          | KDA, Kimi Linear (2510.26692)        |

A rank's tokens are segments of consecutive positions, in the order of the layout; the state that enters a segment comes
from elsewhere. So a kernel's work has two halves: `begin` and `summary`, what each segment does to whatever state
enters it; and `finish`, the outputs, once these states are known. Everything is differentiable by autograd with respect
to q, k, v, g, beta and the states.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, Protocol

import torch
from torch import Tensor

from longctx.kernels.linear.affine import Affine
from longctx.kernels.merge import accumulator_dtype

Gate = Literal["none", "fixed", "scalar", "diagonal"]


@dataclass(frozen=True, kw_only=True)
class LinearRequest:
    """What a kernel is asked to serve; a kernel that cannot serve it gives the reason before anything runs.

    Attributes:
        gate: shape of the log decays: `none`, `fixed` `[H]`, `scalar` `[B, T, H]`, `diagonal` `[B, T, H, K]`.
        delta: whether there is a beta: the delta rule.
        key_dim, value_dim: K and V; the value may carry a column more for a normaliser.
        chunk_size: tokens of a chunk, None = the kernel's own choice.
    """

    device_type: str
    dtype: torch.dtype
    gate: Gate
    delta: bool
    key_dim: int
    value_dim: int
    chunk_size: int | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Cuts:
    """Where the sequence of one rank's T tokens is cut.

    Attributes:
        lengths: tokens of each segment of consecutive positions, in local order; P of them, their sum is T.
        documents: int32 `[R, T]`, the number of each token's document, R = 1 or one row per sequence; equal iff same
            document, not necessarily from 0 upwards. None = all tokens are of one document.
        before: int32 `[R, P]`, the document of the token before each segment's first one in the sequence, wherever it
            is; at the sequence's first position that of the first token itself, so that an initial state enters.
            Where it differs from the first token's, the entering state is not used. None iff `documents` is None.
    """

    lengths: tuple[int, ...]
    documents: Tensor | None = None
    before: Tensor | None = None

    def __post_init__(self) -> None:
        assert self.lengths and min(self.lengths) > 0, self.lengths
        assert (self.documents is None) == (self.before is None)

    @property
    def tokens(self) -> int:
        """Return T."""
        return sum(self.lengths)

    @property
    def bounds(self) -> tuple[int, ...]:
        """Return where segments begin in local indices, and T at the end."""
        bounds = [0]
        for length in self.lengths:
            bounds.append(bounds[-1] + length)
        return tuple(bounds)


def whole(tokens: int, cu_seqlens: tuple[int, ...] | None = None, device: torch.device | None = None) -> Cuts:
    """Return the cuts of whole sequences on one device, packed from documents with these bounds (0 ... tokens)."""
    if cu_seqlens is None:
        return Cuts(lengths=(tokens,))
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != tokens or any(b <= a for a, b in pairwise(cu_seqlens)):
        raise ValueError(f"cu_seqlens must go strictly upwards from 0 to {tokens}; given {cu_seqlens}")
    counts = torch.tensor([b - a for a, b in pairwise(cu_seqlens)])
    documents = torch.arange(len(counts), dtype=torch.int32).repeat_interleave(counts)[None].to(device)
    return Cuts(lengths=(tokens,), documents=documents, before=documents[:, :1])


class LinearWork(Protocol):
    """A kernel's work on one call's tensors."""

    def summary(self) -> Affine:
        """Return what each segment does to a state: transition `[B, P, H, ...]`, state `[B, P, H, K, V]`.

        The transition is `[..., 1, 1]` for gates none, fixed and scalar, `[..., K, 1]` for diagonal, `[..., K, K]` with
        delta; 0 where a document begins in the segment.
        """
        ...

    def finish(self, states: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return out and the states after the segments.

        Args:
            states: `[B, P, H, K, V]`, what enters each segment; None = zeros.

        Returns:
            out `[B, T, H, V]` in q's dtype, and states `[B, P, H, K, V]`. All of states' dtypes are float32, or float64
            for float64 inputs.
        """
        ...


class LinearKernel(Protocol):
    """Linear attention on one device."""

    name: str

    def unsupported(self, request: LinearRequest) -> str | None:
        """Return why this kernel cannot serve the request, or None if it can."""
        ...

    def begin(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        g: Tensor | None,
        beta: Tensor | None,
        scale: float,
        cuts: Cuts,
        chunk_size: int | None,
    ) -> LinearWork:
        """Take up a call; the shapes have been checked.

        Args:
            q, k: `[B, T, H, K]`.
            v: `[B, T, H, V]`, same dtype.
            g: None, `[H]`, `[B, T, H]` or `[B, T, H, K]`, <= 0; float32, or float64 for float64 inputs.
            beta: None or `[B, T, H]`, in q's dtype or in that of g.
            scale: of q.
            cuts: where segments and documents begin.
            chunk_size: tokens of a chunk; None = the kernel's own choice.
        """
        ...


def gate_of(g: Tensor | None) -> Gate:
    """Return the kind of gate that log decays of this shape are."""
    return "none" if g is None else ("fixed", "none", "scalar", "diagonal")[g.dim() - 1]  # type: ignore[return-value]


def state_dtype(q: Tensor) -> torch.dtype:
    """Return the dtype of states, transitions and decays: float32, or float64 for float64 inputs."""
    return accumulator_dtype(q.dtype)
