"""Linear attention with decays, or none, by Triton kernels: the differentiable steps, and the work made of them.

`ChunkMaps` makes what each chunk adds to a state and stands for the outputs from nothing; `Scan` the states that enter
chunks; `Output` the outputs. Between them flow the states, and gradients come back the same way. The gradients of k and
v have a part that comes through the outputs and one that comes through the states. Both are added up in float32 inside
of `ChunkMaps`' backward kernels: `Output` hands dout on to it by way of a tensor without contents, `nothing`, whose
gradient dout is (out = outputs from nothing + those from the entering states).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longctx.kernels.linear.affine import Affine
from longctx.kernels.linear.contract import Cuts, Gate, gate_of
from longctx.kernels.linear.triton.chunk_backward import dk_kernel, dq_kernel, dv_kernel
from longctx.kernels.linear.triton.chunk_forward import out_kernel, outer_kernel
from longctx.kernels.linear.triton.chunks import ChunkDocuments, ChunkTable, chunk_documents, chunk_table
from longctx.kernels.linear.triton.scan import Scan
from longctx.kernels.triton_common.launch import cdiv, launch
from longctx.kernels.triton_common.tile_table import Entry, Tile, block

# exp of it is 0 in float32, with room: stronger gates would only make running sums lose digits.
WEAKEST = -1e4


@dataclass(frozen=True, eq=False)
class Problem:
    """What is the same for all kernels of one call.

    `gate` is `none`, `scalar` (also for fixed decays) or `diagonal`.
    """

    gate: Gate
    scale: float
    table: ChunkTable
    documents: ChunkDocuments | None
    entry: Entry

    @property
    def rows(self) -> int:
        """Return C, the rows of a chunk's block: a power of two of at least 16."""
        return block(self.table.size, self.table.size * 16)

    def arguments(self, q: Tensor, v: Tensor, tile: Tile) -> dict[str, Any]:
        """Return the arguments that every kernel takes."""
        key_dim, value_dim = q.shape[-1], v.shape[-1]
        return {
            "documents": None if self.documents is None else self.documents.tokens,
            "begins": self.table.begin,
            "counts": self.table.count,
            "scale": self.scale,
            "tokens": q.shape[1],
            "chunks": self.table.chunks,
            "document_rows": 1 if self.documents is None else self.documents.tokens.shape[0],
            "H": q.shape[2],
            "K": key_dim,
            "V": value_dim,
            "C": self.rows,
            "BK": block(key_dim, tile.key),
            "BV": block(value_dim, tile.value),
            "GATE": self.gate,
            "PRECISION": self.entry.precision,
        }

    @property
    def entering(self) -> Tensor | None:
        """Return the documents of the states that enter chunks."""
        return None if self.documents is None else self.documents.entering

    def states_like(self, q: Tensor, v: Tensor) -> Tensor:
        """Return an empty `[B, N, H, K, V]`."""
        shape = (q.shape[0], self.table.chunks, q.shape[2], q.shape[3], v.shape[3])
        return torch.empty(shape, dtype=torch.float32, device=q.device)

    def outer(self, x: Tensor, y: Tensor, gates: Tensor | None, *, side: str) -> tuple[Tensor, Tensor | None]:
        """Return sum_t w_t x_t y_t^T of every chunk (see `outer_kernel`), and for `diagonal` at its end gates' sums."""
        tile = self.entry.tiles["outer"]
        result, totals = self.states_like(x, y), None
        if side == "end" and self.gate == "diagonal":
            totals = torch.empty(result.shape[:-1], dtype=torch.float64, device=x.device)
        arguments = self.arguments(x, y, tile) | {"x": x, "y": y, "gates": gates, "entering": self.entering}
        arguments |= {"result": result, "totals": totals, "SIDE": side}
        arguments["scale"] = 1.0 if side == "end" else self.scale
        blocks = cdiv(x.shape[-1], arguments["BK"]) * cdiv(y.shape[-1], arguments["BV"])
        self.launch(outer_kernel, blocks, x, arguments, tile)
        return result, totals

    def launch(self, kernel: Any, blocks: int, q: Tensor, arguments: dict[str, Any], tile: Tile) -> None:
        """Launch a kernel over so many blocks of every chunk, for every row and head."""
        grid = (blocks * self.table.chunks, q.shape[0] * q.shape[2])
        launch(kernel, grid, arguments, warps=tile.warps, stages=tile.stages)

    @property
    def levels(self) -> int:
        """Return log2 C."""
        return self.rows.bit_length() - 1


class ChunkMaps(torch.autograd.Function):
    """(q, k, v, g, gates) -> R `[B, N, H, K, V]`, for `diagonal` the chunks' sums of gates `[B, N, H, K]`, `nothing`.

    Differentiable in k, v and g (None, `[B, T, H]` or `[B, T, H, K]`), which the kernels read as `gates`. q has no part
    in R; the gradient through `nothing` needs it.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, gates: Tensor | None, problem: Problem
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        made, totals = problem.outer(k, v, gates, side="end")
        ctx.save_for_backward(q, k, v, gates)
        ctx.problem = problem
        return made, totals, v.new_empty(1).expand(v.shape)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dmade: Tensor, dtotals: Tensor | None, dout: Tensor
    ) -> tuple[None, Tensor, Tensor, Tensor | None, None, None]:
        q, k, v, gates = ctx.saved_tensors
        problem: Problem = ctx.problem
        given = {"q": q, "k": k, "gates": gates, "dstates": dmade.contiguous(), "dout": dout.contiguous()}
        given["LEVELS"] = problem.levels
        dk, dv = torch.empty_like(k), torch.empty_like(v)
        tile = problem.entry.tiles["dk"]
        arguments = problem.arguments(q, v, tile) | given
        blocks = cdiv(k.shape[-1], arguments["BK"])
        dgates = _gate_gradients(problem, k, blocks)
        arguments |= {"v": v, "dtotals": None if dtotals is None else dtotals.contiguous(), "dk": dk, "dgates": dgates}
        problem.launch(dk_kernel, blocks, k, arguments | {"rows_of_all": k[..., 0].numel()}, tile)
        tile = problem.entry.tiles["dv"]
        arguments = problem.arguments(q, v, tile) | given | {"dv": dv}
        problem.launch(dv_kernel, cdiv(v.shape[-1], arguments["BV"]), v, arguments, tile)
        return None, dk, dv, _summed(problem, dgates), None, None


class Output(torch.autograd.Function):
    """(q, k, v, g, gates, states that enter chunks, `nothing`) -> out `[B, T, H, V]`.

    Differentiable in q, g, states and `nothing`, through which the gradients of k and v go.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor | None,
        gates: Tensor | None,
        states: Tensor,
        nothing: Tensor,
        problem: Problem,
    ) -> Tensor:
        out, tile = torch.empty_like(v), problem.entry.tiles["out"]
        arguments = problem.arguments(q, v, tile) | {"q": q, "k": k, "v": v, "gates": gates, "states": states}
        arguments |= {"entering": problem.entering, "out": out, "LEVELS": problem.levels}
        problem.launch(out_kernel, cdiv(v.shape[-1], arguments["BV"]), v, arguments, tile)
        ctx.save_for_backward(q, k, v, gates, states)
        ctx.problem = problem
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None, None, Tensor | None, None, Tensor, Tensor, None]:
        q, k, v, gates, states = ctx.saved_tensors
        problem: Problem = ctx.problem
        dout = dout.contiguous()
        dq, tile = torch.empty_like(q), problem.entry.tiles["dq"]
        arguments = problem.arguments(q, v, tile) | {"q": q, "k": k, "v": v, "gates": gates, "states": states}
        blocks = cdiv(q.shape[-1], arguments["BK"])
        dgates = _gate_gradients(problem, q, blocks)
        arguments |= {"entering": problem.entering, "dout": dout, "dq": dq, "dgates": dgates}
        arguments |= {"LEVELS": problem.levels, "rows_of_all": q[..., 0].numel()}
        problem.launch(dq_kernel, blocks, q, arguments, tile)
        dstates, _ = problem.outer(q, dout, gates, side="begin")
        return dq, None, None, _summed(problem, dgates), None, dstates, dout, None


def _gate_gradients(problem: Problem, q: Tensor, blocks: int) -> Tensor | None:
    """Return an empty tensor for the gradient of gates as `dq_kernel` and `dk_kernel` write it."""
    if problem.gate == "none":
        return None
    shape = q.shape if problem.gate == "diagonal" else (blocks, *q.shape[:-1])
    return torch.empty(shape, dtype=torch.float32, device=q.device)


def _summed(problem: Problem, dgates: Tensor | None) -> Tensor | None:
    return dgates.sum(0) if dgates is not None and problem.gate == "scalar" else dgates


class DecayedWork:
    """One call's chunks; see `contract.LinearWork`."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        g: Tensor | None,
        scale: float,
        cuts: Cuts,
        chunk_size: int,
        entry: Entry,
    ) -> None:
        table = chunk_table(cuts.lengths, chunk_size, q.device)
        gate = "scalar" if gate_of(g) == "fixed" else gate_of(g)
        self.problem = Problem(gate, scale, table, chunk_documents(cuts, table), entry)
        self.q, self.k, self.v = q, k, v
        totals = self.g = self.gates = None
        if g is not None and gate == "scalar":
            sums = running_sums(g, table, q.shape[0])
            totals, self.gates = sums[:, table.last, :, None], sums.detach()
            self.g = g.double().expand(q.shape[:3])  # a fixed decay's gradient is a sum over all tokens
        elif g is not None:
            self.g = g.clamp(min=WEAKEST).contiguous()
            self.gates = self.g.detach()
        self.made, sums, self.nothing = ChunkMaps.apply(q, k, v, self.g, self.gates, self.problem)
        self.totals = totals if sums is None else sums  # log decays of chunks [B, N, H, 1 or K], None = no decay
        kept = None if self.problem.documents is None else self.problem.documents.kept
        self.transitions = self._decays(self.totals, kept, table.chunks)

    def summary(self) -> Affine:
        """Return what segments do to states."""
        documents, counts = self.problem.documents, self.problem.table.per_segment
        _, made = Scan.apply(self.transitions, self.made, None, self.problem.table, self.problem.entry)
        totals = self.totals
        if totals is not None:
            totals = torch.stack([part.sum(1) for part in totals.split(counts, dim=1)], dim=1)
        carried = None if documents is None else documents.carried
        return Affine(self._decays(totals, carried, len(counts))[..., None], made)

    def finish(self, states: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return out, and the states after the segments."""
        entering, final = Scan.apply(self.transitions, self.made, states, self.problem.table, self.problem.entry)
        k, v = self.k.detach(), self.v.detach()  # their gradients go through `nothing`
        return Output.apply(self.q, k, v, self.g, self.gates, entering, self.nothing, self.problem), final

    def _decays(self, totals: Tensor | None, kept: Tensor | None, count: int) -> Tensor:
        """Return decays `[B, count, H, 1 or K]` from their logarithms, 0 where a document begins."""
        batch, _, heads, _ = self.q.shape
        if totals is None:
            decays = torch.ones(batch, count, heads, 1, dtype=torch.float32, device=self.q.device)
        else:
            decays = totals.exp().float()
        return decays if kept is None else decays * kept[:, :, None, None]


def running_sums(g: Tensor, table: ChunkTable, batch: int) -> Tensor:
    """Return float64 `[B, T, H]`: each token's sum of gates `[H]` or `[B, T, H]` from its chunk's first token on."""
    wide = g.double().clamp(min=WEAKEST)
    tokens = int(table.count.sum()) if g.dim() == 1 else g.shape[1]
    chunk = torch.repeat_interleave(table.count.long(), output_size=tokens)
    place = torch.arange(tokens, device=g.device) - table.begin[chunk]
    if g.dim() == 1:
        return ((place[:, None] + 1) * wide).expand(batch, tokens, *g.shape).contiguous()
    # Chunk by chunk: as differences of sums over the whole sequence they would lose digits to all gates before them.
    rows = (table.begin[:, None] + torch.arange(table.size, device=g.device)).clamp(max=tokens - 1)
    return wide[:, rows].cumsum(2)[:, chunk, place]
