"""Softmax attention by Triton kernels: any lists of tiles in one launch, whatever layout and mask they come from."""

from typing import Any

import torch
from torch import Tensor

from longctx.kernels.contract import Request, Scores, WorkList
from longctx.kernels.merge import Partial
from longctx.kernels.softmax.memory import dense_heads
from longctx.kernels.softmax.triton.table import Sizes, Table, key_table, query_table
from longctx.kernels.softmax.triton.tile_table import Blocks, Entry, SoftmaxTable, table_of
from longctx.kernels.triton_common.launch import launch, reason_not_to_run
from longctx.kernels.triton_common.tile_table import arch_of, block

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_HEAD_DIM = 256


class TritonKernel:
    """Forward and backward on CUDA devices; on the CPU under Triton's interpreter.

    Deterministic: every sum is made by one program, in one order. Matrix products are those of the inputs' dtype (p and
    ds are rounded to it), everything else is float32.

    Args:
        tiles: what to use instead of the committed table of the device's architecture.
    """

    name = "triton"

    def __init__(self, *, tiles: SoftmaxTable | None = None) -> None:
        self.tiles = tiles

    def unsupported(self, request: Request) -> str | None:
        """Return why a request is not served."""
        reason = reason_not_to_run(request.device_type)
        if reason is not None:
            return reason
        if request.predicate:
            return "an arbitrary predicate has no band: only the reference kernel evaluates it densely"
        if request.dtype not in DTYPES:
            return f"its matrix products are those of bfloat16, float16 and float32; given {request.dtype}"
        if max(request.head_dim, request.v_head_dim) > MAX_HEAD_DIM:
            return f"head dims go up to {MAX_HEAD_DIM}; given {request.head_dim} and {request.v_head_dim}"
        return None

    def serving(self, work: WorkList) -> str:
        """Return the kernel's name: it serves all work."""
        return self.name

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, work: WorkList, scores: Scores, partial: Partial) -> None:
        from longctx.kernels.softmax.triton.forward import forward_kernel

        q, k, v = (dense_heads(x) for x in (q, k, v))
        _check(partial.out)
        entry = self._entry(q, v)
        table = query_table(work, _sizes(q, k, entry.forward), q.device)
        tensors = {"q": q, "k": k, "v": v, "out": partial.out, "lse": partial.lse}
        arguments = tensors | _strides(q=q, k=k, v=v, o=partial.out) | _row_strides(l=partial.lse)
        _launch(forward_kernel, table, arguments, q, v, entry, entry.forward, scores, table_rows=q.shape[1])

    def backward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        work: WorkList,
        scores: Scores,
        dout: Tensor,
        delta: Tensor,
        lse: Tensor,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
    ) -> None:
        from longctx.kernels.softmax.triton.backward import key_gradients_kernel, query_gradient_kernel

        q, k, v, dout = (dense_heads(x) for x in (q, k, v, dout))
        _check(dq, dk, dv)
        entry = self._entry(q, v)
        arguments: dict[str, Any] = {"q": q, "k": k, "v": v, "dout": dout, "lse": lse, "delta": delta}
        arguments |= _strides(q=q, k=k, v=v, o=dout) | _row_strides(l=lse, e=delta)
        arguments["scale"] = scores.softmax_scale
        table = query_table(work, _sizes(q, k, entry.dq), q.device)
        mine = arguments | {"dq": dq} | _strides(g=dq)
        _launch(query_gradient_kernel, table, mine, q, v, entry, entry.dq, scores, table_rows=q.shape[1])
        blocks = entry.key_gradients(softcap=scores.softcap is not None, head_dims=(q.shape[-1], v.shape[-1]))
        table = key_table(work, _sizes(q, k, blocks), q.device)
        mine = arguments | {"dk": dk, "dv": dv} | _strides(g=dk, w=dv)
        _launch(key_gradients_kernel, table, mine, q, v, entry, blocks, scores, table_rows=k.shape[1])

    def _entry(self, q: Tensor, v: Tensor) -> Entry:
        tiles = self.tiles or table_of(arch_of(q.device))
        return tiles.entry(q.dtype, q.shape[-1], v.shape[-1])


def _sizes(q: Tensor, k: Tensor, blocks: Blocks) -> Sizes:
    return Sizes(q.shape[0], q.shape[1], k.shape[1], blocks.queries, blocks.keys, _programs(blocks, q.device))


def _programs(blocks: Blocks, device: torch.device) -> int | None:
    if not blocks.programs:
        return None
    units = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return blocks.programs * units


def _launch(
    kernel: Any,
    table: Table,
    arguments: dict[str, Any],
    q: Tensor,
    v: Tensor,
    entry: Entry,
    blocks: Blocks,
    scores: Scores,
    *,
    table_rows: int,
) -> None:
    head_dim, value_dim = q.shape[-1], v.shape[-1]
    arguments = arguments | {
        "ranges": table.ranges,
        "begins": table.begins,
        "ends": table.ends,
        "rows": table_rows,
        "factor": scores.softmax_scale / (scores.softcap or 1.0),
        "softcap": scores.softcap or 1.0,
        "q_tokens": q.shape[1],
        "k_tokens": v.shape[1],
        "D": head_dim,
        "DV": value_dim,
        "BM": blocks.queries,
        "BN": blocks.keys,
        "BD": block(head_dim, MAX_HEAD_DIM),
        "BV": block(value_dim, MAX_HEAD_DIM),
        "SOFTCAP": scores.softcap is not None,
        "PERSISTENT": blocks.programs > 0,
        "PRECISION": entry.precision,
    }
    programs = _programs(blocks, q.device)
    for items in table.items:
        grid = (len(items) if programs is None else min(programs, len(items)),)
        launch(
            kernel, grid, arguments | {"items": items, "count": len(items)}, warps=blocks.warps, stages=blocks.stages
        )


def _check(*accumulators: Tensor) -> None:
    """Kernels write to them in place: what they assume must hold."""
    for x in accumulators:
        assert x.stride(-1) == 1 and x.dtype == torch.float32, (x.shape, x.stride(), x.dtype)


def _strides(**tensors: Tensor) -> dict[str, int]:
    """Return the strides of `[B, T, H, D]` tensors as kernels name them; D's is 1."""
    return {f"{name}{dim}": x.stride(place) for name, x in tensors.items() for place, dim in enumerate("bth")}


def _row_strides(**tensors: Tensor) -> dict[str, int]:
    """Return the strides of `[B, H, T]` tensors as kernels name them."""
    return {f"{name}{dim}": x.stride(place) for name, x in tensors.items() for place, dim in enumerate("bht")}
