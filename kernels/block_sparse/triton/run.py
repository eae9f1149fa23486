"""The launches of a pass: kernels over the pairs of a hop, a part of them at a time, and what merges their results."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from longctx.kernels.block_sparse.pairs import Pairs
from longctx.kernels.block_sparse.triton.hop import MAX_HEAD_DIM, Hop, launches_of, pair_arguments
from longctx.kernels.block_sparse.triton.tile_table import Entry
from longctx.kernels.merge import Partial
from longctx.kernels.softmax.triton.tile_table import Blocks
from longctx.kernels.triton_common.launch import cdiv, launch
from longctx.kernels.triton_common.tile_table import block

COLUMNS = 1024


def attend_pairs(hop: Hop, blocks: Blocks, width: int) -> Iterator[tuple[Pairs, Tensor, Tensor]]:
    """Yield pairs with out `[P, G, Dv]` and lse `[P, G]` of each, float32, by their numbers."""
    from longctx.kernels.block_sparse.triton.forward import forward_kernel

    arguments = hop.arguments(blocks, width)
    for pairs in hop.pairs(width):
        outs = hop.q.new_empty(pairs.count, hop.group, hop.v.shape[-1], dtype=torch.float32)
        lses = outs.new_empty(outs.shape[:2])
        mine = arguments | pair_arguments(pairs) | {"outs": outs, "lses": lses}
        for part in launches_of(pairs, blocks.queries, heads=hop.group):
            masked = part.masked or width % arguments["BN"] != 0
            own = {"items": part.items, "MASKED": masked}
            launch(forward_kernel, (len(part.items),), mine | own, warps=blocks.warps, stages=blocks.stages)
        yield pairs, outs, lses


def key_gradients(
    hop: Hop, entry: Entry, width: int, *, dout: Tensor, lse: Tensor, delta: Tensor, slots: int, dq: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of keys and values in lanes, float32 `[B, lanes, Tk, .]`; add those of queries to `dq`.

    Args:
        lse, delta: float32 `[B, T, H]`, or `[B, T, H, slots]` with gates.
        dq: float32 `[B, T, H, D]`, without gaps, as dout.
    """
    from longctx.kernels.block_sparse.triton.backward import backward_kernel

    blocks = entry.backward
    batch, lanes, tokens = hop.k.shape[:3]
    tiles, per_lane = batch * lanes * hop.tiles(width), hop.tiles(width)
    dk, dv = (x.new_zeros(tiles, width, x.shape[-1], dtype=torch.float32) for x in (hop.k, hop.v))
    arguments = hop.arguments(blocks, width) | {"dout": dout, "lse": lse, "delta": delta}
    arguments |= {"slots_each": slots, "GATED": hop.weights == "gated"}
    for pairs in hop.pairs(width):
        dqs = dk.new_empty(pairs.count, hop.group, hop.q.shape[-1])
        mine = arguments | pair_arguments(pairs) | {"slots": pairs.slot, "dqs": dqs}
        for part in launches_of(pairs, entry.turns * blocks.queries, heads=hop.group):
            masked = part.masked or width != arguments["BN"]
            dks, dvs = (x.new_empty(len(part.items), *x.shape[1:]) for x in (dk, dv))
            own = {"items": part.items, "MASKED": masked, "dks": dks, "dvs": dvs}
            launch(backward_kernel, (len(part.items),), mine | own, warps=blocks.warps, stages=blocks.stages)
            add_sums(dks, part.begins, part.groups, into=dk, scale=hop.scores.softmax_scale)
            add_sums(dvs, part.begins, part.groups, into=dv)
        add_sums(dqs, pairs.begin, pairs.rows, into=dq, scale=hop.scores.softmax_scale)
    keys, values = (x.view(batch, lanes, per_lane * width, x.shape[-1])[:, :, :tokens] for x in (dk, dv))
    return keys, values


def merge_pairs(outs: Tensor, lses: Tensor, pairs: Pairs, hop: Hop, partial: Partial) -> None:
    """Merge the results of each query's pairs into `partial`."""
    from longctx.kernels.block_sparse.triton.turns import merge_kernel

    group, value_dim = outs.shape[1:]
    out_strides, lse_strides = partial.out.stride(), partial.lse.stride()
    arguments: dict[str, Any] = {"outs": outs, "lses": lses, "begins": pairs.begin, "rows": pairs.rows}
    arguments |= {"out": partial.out, "lse": partial.lse, "tokens": hop.q.shape[1], "heads": hop.heads}
    arguments |= dict(zip(("ob", "ot", "oh"), out_strides[:3], strict=True))
    arguments |= dict(zip(("lb", "lh", "lt"), lse_strides, strict=True))
    arguments |= {"G": group, "DV": value_dim, "BG": 1 << (group - 1).bit_length()}
    arguments |= {"BV": block(value_dim, MAX_HEAD_DIM)}
    launch(merge_kernel, (len(pairs.rows),), arguments, warps=1 if group == 1 else 4, stages=1)


def add_sums(parts: Tensor, begins: Tensor, targets: Tensor, *, into: Tensor, scale: float = 1.0) -> None:
    """Add the sum of `parts[begins[n] : begins[n + 1]]`, scaled, to place `targets[n]` of `into`, without gaps."""
    from longctx.kernels.block_sparse.triton.turns import sum_kernel

    columns = parts[0].numel()
    size = block(columns, COLUMNS)
    arguments: dict[str, Any] = {"parts": parts, "begins": begins, "targets": targets, "out": into, "scale": scale}
    arguments |= {"columns": columns, "BLOCK": size}
    launch(sum_kernel, (len(targets), cdiv(columns, size)), arguments, warps=4, stages=1)
