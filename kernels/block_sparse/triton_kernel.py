"""Selected attention by Triton kernels: queries gathered by the tile of keys that they visit, results pair by pair.

The same plan as in plain torch (`pairs.py`), whose integers are made on the tensors' device. A pair of a query and a
tile of keys leaves its result by itself, and one more kernel merges them query by query: nothing is added atomically.
"""

import torch
from torch import Tensor

from longctx.kernels.block_sparse.contract import Weights
from longctx.kernels.block_sparse.lanes import add_from_lanes
from longctx.kernels.block_sparse.selection import Selection
from longctx.kernels.block_sparse.triton.hop import MAX_HEAD_DIM, Hop, even, hop_of
from longctx.kernels.block_sparse.triton.run import add_sums, attend_pairs, key_gradients, merge_pairs
from longctx.kernels.block_sparse.triton.tile_table import Entry, SparseTable, table_of
from longctx.kernels.contract import Request, Scores
from longctx.kernels.merge import Partial
from longctx.kernels.triton_common.launch import reason_not_to_run
from longctx.kernels.triton_common.tile_table import arch_of

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Keys of a tile at most in the forward pass, whose programs go through the blocks of one.
WIDTH = 512


class TritonSparseKernel:
    """Forward and backward on CUDA devices; on the CPU under Triton's interpreter.

    Deterministic: every sum is made by one program, in one order. Matrix products are those of the inputs' dtype (p and
    ds are rounded to it), everything else is float32.

    Args:
        tiles: what to use instead of the committed table of the device's architecture.
    """

    name = "triton"

    def __init__(self, *, tiles: SparseTable | None = None) -> None:
        self.tiles = tiles

    def unsupported(self, request: Request, weights: Weights) -> str | None:
        """Return why a request is not served."""
        reason = reason_not_to_run(request.device_type)
        if reason is not None:
            return reason
        if request.predicate:
            return "a selection has no arbitrary predicates"
        if request.dtype not in DTYPES:
            return f"its matrix products are those of bfloat16, float16 and float32; given {request.dtype}"
        if max(request.head_dim, request.v_head_dim) > MAX_HEAD_DIM:
            return f"head dims go up to {MAX_HEAD_DIM}; given {request.head_dim} and {request.v_head_dim}"
        if weights == "sum" and request.softcap:
            return "products that are the weights themselves are not capped"
        return None

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        selection: Selection,
        k_positions: Tensor,
        weights: Weights,
        gates: Tensor | None,
        scores: Scores,
        partial: Partial,
    ) -> None:
        """Merge into `partial`; see the contract."""
        entry = self._entry(q, v)
        hop = hop_of(
            *(q, k, v),
            selection=selection,
            k_positions=k_positions,
            weights=weights,
            scores=scores,
            precision=entry.precision,
        )
        out = partial.out.contiguous()
        for pairs, outs, lses in attend_pairs(hop, entry.forward, _forward_width(hop, selection)):
            if weights == "sum":
                add_sums(outs, pairs.begin, pairs.rows, into=out)
                continue
            if gates is not None:  # a slot counts by its gate
                logits = gates.reshape(-1, hop.group, selection.slots)
                lses[pairs.number] = logits[pairs.rows[pairs.place], :, pairs.slot].float()
            merge_pairs(outs, lses, pairs, hop, Partial(out, partial.lse))
        if out.data_ptr() != partial.out.data_ptr():
            partial.out.copy_(out)

    def backward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        selection: Selection,
        k_positions: Tensor,
        weights: Weights,
        gates: Tensor | None,
        scores: Scores,
        dout: Tensor,
        delta: Tensor,
        lse: Tensor,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
        dgates: Tensor | None,
    ) -> None:
        """Add to `dq, dk, dv, dgates`; see the contract."""
        entry = self._entry(q, v)
        hop = hop_of(
            *(q, k, v),
            selection=selection,
            k_positions=k_positions,
            weights=weights,
            scores=scores,
            precision=entry.precision,
        )
        dout = dout.contiguous()
        lse, delta = (x.transpose(1, 2).contiguous() for x in (lse, delta))
        if gates is not None:
            assert dgates is not None
            lse, delta = self._slot_terms(hop, selection, gates, dout, lse, delta, dgates)
        queries = dq.contiguous()
        width = even(selection.block_size, entry.backward.keys, keys=k.shape[1])
        keys, values = key_gradients(
            *(hop, entry, width), dout=dout, lse=lse, delta=delta, slots=selection.slots, dq=queries
        )
        if queries.data_ptr() != dq.data_ptr():
            dq.copy_(queries)
        add_from_lanes(keys, hop.lanes, into=dk)
        add_from_lanes(values, hop.lanes, into=dv)

    def _slot_terms(
        self, hop: Hop, selection: Selection, gates: Tensor, dout: Tensor, lse: Tensor, delta: Tensor, dgates: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return what each slot has in place of lse and delta, float32 `[B, T, H, S]`; add to `dgates`.

        The weight of a key is `share exp(s - own)` with its slot's own lse and `share = exp(gate - lse)`: that is
        `exp(s - L)` with `L = own + lse - gate`. The gradients of its scores are `p (dp - slot)` with `slot =
        rowsum(dout out)` of the slot's own out, which the forward kernel makes once more. `dgate = share (slot -
        delta)` (`weights.py`).
        """
        shape = (-1, hop.group, selection.slots)
        own, slot, seen = (torch.zeros(gates.shape, device=gates.device).view(shape) for _ in range(3))
        douts = dout.view(-1, hop.group, dout.shape[-1])
        blocks = self._entry(hop.q, hop.v).forward
        for pairs, outs, lses in attend_pairs(hop, blocks, _forward_width(hop, selection)):
            rows = pairs.rows[pairs.place]
            own[rows, :, pairs.slot] = lses[pairs.number]
            slot[rows, :, pairs.slot] = (outs[pairs.number] * douts[rows]).sum(-1)
            seen[rows, :, pairs.slot] = 1.0
        own, slot, seen = (x.view(gates.shape) for x in (own, slot, seen))
        distance = torch.where(seen > 0, lse[..., None] - gates.float(), 0.0)
        dgates += seen * torch.exp(-distance) * (slot - delta[..., None])
        return own + distance, slot

    def _entry(self, q: Tensor, v: Tensor) -> Entry:
        tiles = self.tiles or table_of(arch_of(q.device))
        return tiles.entry(q.dtype, q.shape[-1], v.shape[-1])


def _forward_width(hop: Hop, selection: Selection) -> int:
    """Return how many keys a tile has: with gates a slot's, which is a block."""
    return selection.block_size if hop.weights == "gated" else even(selection.block_size, WIDTH, keys=hop.k.shape[2])
