"""The chunked form in plain torch: any device, any dtype, every kind.

Matrix products inside of chunks, a recurrence of states between them. Terms of chunks are computed some chunks at a
time, and once more in the backward: what is T x C is never kept.
"""

import torch
from torch import Tensor

from longctx.kernels.linear.affine import Affine
from longctx.kernels.linear.chunks import chunks_of
from longctx.kernels.linear.contract import Cuts, LinearRequest, gate_of, state_dtype
from longctx.kernels.linear.read import Read
from longctx.kernels.linear.sight import Documents
from longctx.kernels.linear.summary import decayed_summary
from longctx.kernels.linear.sweep import Inputs, Sweep, Task

CHUNK = 64
PER_TOKEN = ("scalar", "diagonal")


class TorchKernel:
    """All kinds, any device, in plain torch."""

    name = "torch"

    def unsupported(self, request: LinearRequest) -> str | None:
        """It serves everything; decays per token are summed by halves."""
        size = request.chunk_size
        if request.gate in PER_TOKEN and size is not None and size & (size - 1):
            return f"with decays per token chunk_size must be a power of 2; given {size}"
        return None

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
    ) -> "TorchWork":
        """Take up a call."""
        return TorchWork(q, k, v, g=g, beta=beta, scale=scale, cuts=cuts, chunk_size=chunk_size)


class TorchWork:
    """The chunks of one call."""

    def __init__(
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
    ) -> None:
        gate = gate_of(g)
        self._tokens, self._cuts = (k, v, g), cuts
        self._chunks = chunks = chunks_of(cuts, chunk_size or CHUNK, power_of_two=gate in PER_TOKEN)
        self._task = Task(
            gate=gate,
            scale=scale,
            dtype=state_dtype(q),
            chunks=chunks,
            tokens=chunks.tokens(q.device),
            documents=None if cuts.documents is None else Documents(cuts, chunks),
        )
        self._inputs = Inputs(
            q=chunks.split(q),
            k=chunks.split(k),
            v=chunks.split(v),
            g=chunks.split(g) if g is not None and gate in PER_TOKEN else g,
            beta=None if beta is None else chunks.split(beta),
        )
        self._dtype = q.dtype
        self._states = (q.shape[0], len(cuts.lengths), q.shape[2], q.shape[3], v.shape[3])
        self._from_nothing: tuple[Tensor, Tensor, Affine] | None = None

    def summary(self) -> Affine:
        """Return the maps of the segments.

        With the delta rule they take most of what outputs take: outputs from nothing are computed on the way, and kept.
        """
        if self._inputs.beta is None:
            summary, k, v = decayed_summary(*self._tokens, cuts=self._cuts, dtype=self._task.dtype)
            self._inputs = self._inputs._replace(k=self._chunks.split(k), v=self._chunks.split(v))
            return summary
        if self._from_nothing is None:
            out, state, queries, transition = self._sweep(None, unit=self._unit())
            self._from_nothing = (out, queries, Affine(transition, state))
        return self._from_nothing[2]

    def finish(self, states: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the outputs and the states after the segments: at once, or what comes on top of the summary's."""
        if self._from_nothing is None:
            out, final, _, _ = self._sweep(states, unit=None)
            return self._chunks.join(out), final
        out, queries, summary = self._from_nothing
        if states is None:
            return self._chunks.join(out).to(self._dtype), summary.state
        out = Read.apply(self._task.blocks(self._inputs.q), self._dtype, out, queries, states)
        return self._chunks.join(out), summary(states)

    def _sweep(self, states: Tensor | None, *, unit: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if states is None:
            states = self._inputs.q.new_zeros(self._states, dtype=self._task.dtype)
        return Sweep.apply(self._task, states, unit, *self._inputs)

    def _unit(self) -> Tensor:
        """Return the identity as transition of the segments."""
        batch, segments, heads, size, _ = self._states
        one = torch.eye(size, dtype=self._task.dtype, device=self._inputs.q.device)
        return one.expand(batch, segments, heads, size, size)
