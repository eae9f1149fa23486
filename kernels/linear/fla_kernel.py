"""flash-linear-attention behind the contract: its public chunk ops, where it is installed and there is a GPU.

| gate            | without beta                 | with beta                 |
|-----------------|------------------------------|---------------------------|
| none            | `chunk_simple_gla`           | `chunk_delta_rule`        |
| fixed           | `chunk_simple_gla(g_gamma=)` | `chunk_gated_delta_rule`  |
| scalar          | `chunk_simple_gla(g=)`       | `chunk_gated_delta_rule`  |
| diagonal        | `chunk_gla`                  | `chunk_kda`               |

Every document in every segment of every row is one of its sequences. It gives final states only together with outputs,
so a summary costs a forward pass of its own, which a single segment on a single rank does not need.
"""

from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from longctx.kernels.linear.affine import Affine
from longctx.kernels.linear.contract import Cuts, LinearRequest, gate_of, state_dtype
from longctx.kernels.linear.sequences import Sequences, sequences

INSTALL = "pip install 'longctx[fla]'"
LARGEST_KEY = 256  # its delta-rule kernels hold a state's whole K
_CHUNK_SIZES = {"none": (16, 32, 64), "fixed": (16, 32, 64), "scalar": (16, 32, 64), "diagonal": (32, 64)}


class FlaKernel:
    """All kinds on CUDA, 16-bit or float32 inputs, states in float32."""

    name = "fla"

    def unsupported(self, request: LinearRequest) -> str | None:
        """Return what is missing: the package, a GPU, or a case in the package."""
        if find_spec("fla") is None:
            return f"flash-linear-attention is not installed ({INSTALL})"
        if request.device_type != "cuda":
            return f"flash-linear-attention needs a CUDA device; the tensors are on {request.device_type}"
        if request.dtype == torch.float64:
            return "flash-linear-attention computes in float32 at most; given float64"
        if request.delta and request.gate == "none" and request.dtype == torch.float32:
            return "its delta rule without decay takes 16-bit inputs only; given float32"
        if request.delta and request.key_dim > LARGEST_KEY:
            return f"its delta rules take key dims up to {LARGEST_KEY}; given {request.key_dim}"
        return _refused_chunk(request)

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
    ) -> "FlaWork":
        """Take up a call."""
        return FlaWork(q, k, v, g=g, beta=beta, scale=scale, cuts=cuts, chunk_size=chunk_size)


class FlaWork:
    """One call's tensors as sequences of their own."""

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
        self.q, self.k, self.v, self.g, self.beta = q, k, v, g, beta
        self.scale, self.cuts, self.chunk_size = scale, cuts, chunk_size
        self.sequences: Sequences = sequences(cuts, rows=q.shape[0], device=q.device)

    def summary(self) -> Affine:
        """Return the maps of the segments.

        With beta, M is what the recurrence makes of the state 1 and values 0: K more columns beside the values.
        """
        (batch, tokens, heads, size), width = self.k.shape, self.v.shape[-1]
        if self.beta is None:
            _, finals = self._run(self.v, None)
            return Affine(self._decays(), finals)
        values = torch.cat([self.v, self.v.new_zeros(batch, tokens, heads, size)], dim=-1)
        one = torch.eye(size, dtype=state_dtype(self.k), device=self.k.device)
        begun = torch.cat([one.new_zeros(size, width), one], dim=-1)
        segments = (batch, len(self.cuts.lengths), heads, size, width + size)
        _, finals = self._run(values, begun.expand(segments))
        state, transition = finals.split([width, size], dim=-1)
        return Affine(self._where_whole(transition), state)

    def finish(self, states: Tensor | None) -> tuple[Tensor, Tensor]:
        """Run every sequence from the state that enters it."""
        return self._run(self.v, states)

    def _run(self, v: Tensor, states: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return out `[B, T, H, V]` and the states after the segments `[B, P, H, K, V]`, from those that enter them."""
        flat, batch = self.sequences.flat, self.k.shape[0]
        size, width = self.k.shape[-1], v.shape[-1]
        odd_key, odd_value = (0, size % 2), (0, width % 2)  # for 16 bits its backward wants even dims: pad with zeros
        g, fixed = self.g, None
        if gate_of(g) == "fixed":
            g, fixed = None, g
        elif g is not None and g.dim() == 4:
            g = _padded(g, odd_key)
        out, finals = _op(
            flat(_padded(self.q, odd_key)),
            flat(_padded(self.k, odd_key)),
            flat(_padded(v, odd_value)),
            g=None if g is None else flat(g),
            g_gamma=fixed,
            beta=None if self.beta is None else flat(self.beta),
            scale=self.scale,
            initial_state=None if states is None else self.sequences.enter(_padded(states, odd_value + odd_key)),
            cu_seqlens=self.sequences.cu_seqlens,
            chunk_size=self.chunk_size,
        )
        finals = self.sequences.leave(finals, rows=batch)[..., :size, :width]
        return out.reshape(batch, -1, *out.shape[2:])[..., :width], finals

    def _decays(self) -> Tensor:
        """Return `[B, P, H, 1 or K, 1]`, the products of the decays of each segment."""
        batch, tokens, heads, _ = self.k.shape
        g = torch.zeros(heads, dtype=state_dtype(self.k), device=self.k.device) if self.g is None else self.g
        g = g.expand(batch, tokens, heads) if g.dim() == 1 else g
        sums = torch.stack([part.sum(1) for part in g.split(self.cuts.lengths, dim=1)], dim=1)
        return self._where_whole(torch.exp(sums.reshape(*sums.shape[:3], -1, 1)))

    def _where_whole(self, transition: Tensor) -> Tensor:
        return torch.where(self.sequences.whole[:, :, None, None, None], transition, 0.0)


def _padded(x: Tensor, widths: tuple[int, ...]) -> Tensor:
    return F.pad(x, widths) if any(widths) else x


def _op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    g: Tensor | None,
    g_gamma: Tensor | None,
    beta: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor]:
    """Call the op for these gates on sequences; g is `[B, T, H]` or `[B, T, H, K]`, g_gamma `[H]`."""
    if g_gamma is not None and (beta is not None or g_gamma.requires_grad):  # it has no gradient for g_gamma
        g, g_gamma = g_gamma.expand(q.shape[:3]), None
    rest = {
        "scale": scale,
        "initial_state": initial_state,
        "output_final_state": True,
        "cu_seqlens": cu_seqlens,
    }
    if chunk_size is not None:
        rest["chunk_size"] = chunk_size
    if beta is None:
        if g is not None and g.dim() == 4:
            from fla.ops.gla import chunk_gla

            return chunk_gla(q, k, v, g, **rest)
        from fla.ops.simple_gla import chunk_simple_gla

        return chunk_simple_gla(q, k, v, g=g, g_gamma=g_gamma, **rest)
    if g is None:
        from fla.ops.delta_rule import chunk_delta_rule

        return chunk_delta_rule(q, k, v, beta, **rest)
    if g.dim() == 3:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule

        return chunk_gated_delta_rule(q, k, v, g, beta, **rest)
    from fla.ops.kda import chunk_kda

    return chunk_kda(q, k, v, g, beta, **rest)


def _refused_chunk(request: LinearRequest) -> str | None:
    size = request.chunk_size
    if size is None:
        return None
    if request.gate == "diagonal" and not request.delta:
        return f"its GLA has no choice of chunk_size; given {size}"
    sizes = _CHUNK_SIZES[request.gate]
    return None if size in sizes else f"it has chunks of {', '.join(map(str, sizes))} tokens; given {size}"
