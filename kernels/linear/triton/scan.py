"""The states that enter chunks: S' = M S + R from chunk to chunk of each segment, and the same backwards.

Decays M are elementwise, so every block of a state is a recurrence of its own: one program per segment, row, head and
block, which walks over the segment's chunks.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from longctx.kernels.linear.triton.chunks import ChunkTable
from longctx.kernels.linear.triton.device import load_state, store_state
from longctx.kernels.triton_common.launch import cdiv, launch
from longctx.kernels.triton_common.tile_table import Entry, block


@triton.jit(do_not_specialize=["chunks", "segments"])
def scan_kernel(
    transitions, made, initial, states, final, bounds, chunks, segments,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, M: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Write the state that enters every chunk and the one that leaves every segment; grid (blocks * P, B * H).

    transitions `[B, N, H, M]`, M = 1 or K; made, states `[B, N, H, K, V]`; initial (or None), final `[B, P, H, K, V]`.
    """
    value_blocks: tl.constexpr = (V + BV - 1) // BV
    blocks: tl.constexpr = (K + BK - 1) // BK * value_blocks
    part, segment = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    row, head = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    keys, values = part // value_blocks * BK + tl.arange(0, BK), part % value_blocks * BV + tl.arange(0, BV)
    edge = ((row * segments + segment) * H + head) * K * V
    state = tl.zeros((BK, BV), tl.float32)
    if initial is not None:
        state = load_state(initial + edge, keys, values, K, V)
    for chunk in range(tl.load(bounds + segment), tl.load(bounds + segment + 1)):
        at = (row * chunks + chunk) * H + head
        store_state(states + at * K * V, keys, values, state, K, V)
        decay = tl.load(transitions + at * M + keys % M, mask=keys < K, other=0.0)
        state = decay[:, None] * state + load_state(made + at * K * V, keys, values, K, V)
    store_state(final + edge, keys, values, state, K, V)


@triton.jit(do_not_specialize=["chunks", "segments", "rows_of_all"])
def scan_backward_kernel(
    transitions, states, dstates, dfinal, dtransitions, dmade, dinitial, bounds, chunks, segments, rows_of_all,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, M: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Walk back: write the gradient of what each chunk made, and of the states that enter segments.

    dtransitions is None or takes this block's share: `[blocks, B, N, H]` for M = 1, `[blocks of V, B, N, H, K]` for
    M = K; rows_of_all = B N H.
    """
    value_blocks: tl.constexpr = (V + BV - 1) // BV
    blocks: tl.constexpr = (K + BK - 1) // BK * value_blocks
    part, segment = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    row, head = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    keys, values = part // value_blocks * BK + tl.arange(0, BK), part % value_blocks * BV + tl.arange(0, BV)
    edge = ((row * segments + segment) * H + head) * K * V
    first, end = tl.load(bounds + segment), tl.load(bounds + segment + 1)
    grad = load_state(dfinal + edge, keys, values, K, V)
    for done in range(end - first):
        at = (row * chunks + end - 1 - done) * H + head
        store_state(dmade + at * K * V, keys, values, grad, K, V)
        if dtransitions is not None:
            share = tl.sum(grad * load_state(states + at * K * V, keys, values, K, V), axis=1)
            if M == 1:
                tl.store(dtransitions + part.to(tl.int64) * rows_of_all + at, tl.sum(share, axis=0))
            else:
                share_at = (part % value_blocks).to(tl.int64) * rows_of_all + at
                tl.store(dtransitions + share_at * K + keys, share, mask=keys < K)
        decay = tl.load(transitions + at * M + keys % M, mask=keys < K, other=0.0)
        grad = decay[:, None] * grad + load_state(dstates + at * K * V, keys, values, K, V)
    if dinitial is not None:
        store_state(dinitial + edge, keys, values, grad, K, V)


class Scan(torch.autograd.Function):
    """transitions `[B, N, H, 1 or K]`, made `[B, N, H, K, V]`, initial -> the states entering chunks, the final ones.

    `initial` is None (zeros) or `[B, P, H, K, V]`, as the final ones are. All are float32.
    """

    @staticmethod
    def forward(
        ctx: Any, transitions: Tensor, made: Tensor, initial: Tensor | None, table: ChunkTable, entry: Entry
    ) -> tuple[Tensor, Tensor]:
        batch, chunks, heads, key_dim, value_dim = made.shape
        segments = len(table.per_segment)
        states, final = torch.empty_like(made), made.new_empty(batch, segments, heads, key_dim, value_dim)
        tile = entry.tiles["scan"]
        keys, values = block(key_dim, tile.key), block(value_dim, tile.value)
        arguments = {
            "transitions": transitions.contiguous(),
            "made": made,
            "initial": None if initial is None else initial.contiguous(),
            "states": states,
            "final": final,
            "bounds": table.bounds,
            "chunks": chunks,
            "segments": segments,
            "H": heads,
            "K": key_dim,
            "V": value_dim,
            "M": transitions.shape[-1],
            "BK": keys,
            "BV": values,
        }
        grid = (cdiv(key_dim, keys) * cdiv(value_dim, values) * segments, batch * heads)
        launch(scan_kernel, grid, arguments, warps=tile.warps, stages=tile.stages)
        ctx.save_for_backward(transitions, states)
        ctx.table, ctx.entry = table, entry
        return states, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dstates: Tensor, dfinal: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None, None, None]:
        transitions, states = ctx.saved_tensors
        batch, chunks, heads, key_dim, value_dim = states.shape
        tile = ctx.entry.tiles["scan_backward"]
        keys, values = block(key_dim, tile.key), block(value_dim, tile.value)
        key_blocks, value_blocks = cdiv(key_dim, keys), cdiv(value_dim, values)
        shares = key_blocks * value_blocks if transitions.shape[-1] == 1 else value_blocks
        dmade = torch.empty_like(states)
        dtransitions = transitions.new_empty(shares, *transitions.shape) if ctx.needs_input_grad[0] else None
        dinitial = dfinal.new_empty(dfinal.shape) if ctx.needs_input_grad[2] else None
        arguments = {
            "transitions": transitions.contiguous(),
            "states": states,
            "dstates": dstates.contiguous(),
            "dfinal": dfinal.contiguous(),
            "dtransitions": dtransitions,
            "dmade": dmade,
            "dinitial": dinitial,
            "bounds": ctx.table.bounds,
            "chunks": chunks,
            "segments": dfinal.shape[1],
            "rows_of_all": batch * chunks * heads,
            "H": heads,
            "K": key_dim,
            "V": value_dim,
            "M": transitions.shape[-1],
            "BK": keys,
            "BV": values,
        }
        grid = (key_blocks * value_blocks * dfinal.shape[1], batch * heads)
        launch(scan_backward_kernel, grid, arguments, warps=tile.warps, stages=tile.stages)
        return None if dtransitions is None else dtransitions.sum(0), dmade, dinitial, None, None
