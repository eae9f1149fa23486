"""The recurrence token by token, as the papers write it: slow, and what everything else is compared with."""

import torch
from torch import Tensor

from longctx.kernels.linear.affine import Affine
from longctx.kernels.linear.contract import Cuts, LinearRequest, gate_of, state_dtype


class Reference:
    """All kinds, any device, one token at a time."""

    name = "reference"

    def unsupported(self, request: LinearRequest) -> str | None:
        """It serves everything; without chunks, a chunk size cannot be honoured."""
        return "it has no chunks: leave chunk_size null" if request.chunk_size is not None else None

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
    ) -> "ReferenceWork":
        """Take up a call."""
        return ReferenceWork(q, k, v, g=g, beta=beta, scale=scale, cuts=cuts)


class ReferenceWork:
    """The recurrence over each segment."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, *, g: Tensor | None, beta: Tensor | None, scale: float, cuts: Cuts
    ) -> None:
        wide = state_dtype(q)
        self.cuts, self.dtype, self.gate, self.delta = cuts, q.dtype, gate_of(g), beta is not None
        self.q, self.k, self.v = q.to(wide) * scale, k.to(wide), v.to(wide)
        self.alpha = _factors(g, like=self.k)  # [B, T, H, 1 or K]
        self.beta = None if beta is None else beta.to(wide)[..., None]

    def summary(self) -> Affine:
        """Return the maps of the segments: run each on the values 0 from the state 1 for M, from 0 for R."""
        (batch, _, heads, size), width = self.k.shape, self.v.shape[-1]
        one = torch.eye(size, dtype=self.k.dtype, device=self.k.device).expand(batch, heads, size, size)
        nothing = self.v.new_zeros(batch, heads, size, width)
        maps = []
        for segment in range(len(self.cuts.lengths)):
            _, state = self._run(segment, nothing, self.v)
            _, transition = self._run(segment, one, self.v.new_zeros(*self.v.shape[:-1], size))
            if not self.delta:
                transition = torch.diagonal(transition, dim1=-2, dim2=-1)[..., None]
                transition = transition if self.gate == "diagonal" else transition[..., :1, :]
            maps.append((transition, state))
        return Affine(*(torch.stack(part, dim=1) for part in zip(*maps, strict=True)))

    def finish(self, states: Tensor | None) -> tuple[Tensor, Tensor]:
        """Run every segment from the state that enters it."""
        (batch, _, heads, size), width = self.k.shape, self.v.shape[-1]
        outs, finals = [], []
        for segment in range(len(self.cuts.lengths)):
            state = self.v.new_zeros(batch, heads, size, width) if states is None else states[:, segment]
            out, state = self._run(segment, state, self.v)
            outs.append(out)
            finals.append(state)
        return torch.cat(outs, dim=1).to(self.dtype), torch.stack(finals, dim=1)

    def _run(self, segment: int, state: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        first, end = self.cuts.bounds[segment : segment + 2]
        # Not x[:, t], whose gradient is as large as x: the backward would be quadratic.
        q, k, v, alpha = (x[:, first:end].unbind(1) for x in (self.q, self.k, values, self.alpha))
        beta = None if self.beta is None else self.beta[:, first:end].unbind(1)
        outs = []
        for t in range(end - first):
            if self.cuts.documents is not None and self.cuts.before is not None:
                previous = self.cuts.before[:, segment] if t == 0 else self.cuts.documents[:, first + t - 1]
                same = (self.cuts.documents[:, first + t] == previous)[:, None, None, None]
                state = torch.where(same, state, 0.0)
            key, value = k[t][..., None], v[t][..., None, :]  # [B, H, K, 1], [B, H, 1, V]
            state = alpha[t][..., None] * state
            if beta is not None:  # what the state has under this key makes way for the new value
                value = beta[t][..., None] * (value - key.mT @ state)
            state = state + key * value
            outs.append((q[t][:, :, None] @ state)[:, :, 0])
        return torch.stack(outs, dim=1), state


def _factors(g: Tensor | None, *, like: Tensor) -> Tensor:
    """Return exp g as `[B, T, H, 1 or K]`."""
    batch, tokens, heads, _ = like.shape
    if g is None:
        return like.new_ones(1, 1, 1, 1).expand(batch, tokens, heads, 1)
    g = g.to(like.dtype)
    if g.dim() == 1:
        g = g.expand(batch, tokens, heads)
    return torch.exp(g if g.dim() == 4 else g[..., None])
