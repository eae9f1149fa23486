"""Linear attention by Triton kernels: what they serve, and which of them."""

import torch
from torch import Tensor

from longctx.kernels.linear.contract import Cuts, LinearRequest, LinearWork, gate_of
from longctx.kernels.triton_common.launch import reason_not_to_run
from longctx.kernels.triton_common.tile_table import TileTable, arch_of

MAX_HEAD_DIM = 256
MAX_HEAD_DIM_OF_DELTA32 = 128  # above, its scans do not fit in registers
MAX_CHUNK = 64


class TritonKernel:
    """All gates, forward and backward, on CUDA devices; on the CPU under Triton's interpreter.

    Args:
        tiles: what to use instead of the committed table of the device's architecture.
    """

    name = "triton"

    def __init__(self, *, tiles: TileTable | None = None) -> None:
        self.tiles = tiles

    def unsupported(self, request: LinearRequest) -> str | None:
        """Return why a request is not served."""
        reason = reason_not_to_run(request.device_type)
        if reason is not None:
            return reason
        if request.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            return f"its matrix products are those of bfloat16, float16 and float32; given {request.dtype}"
        narrow = request.delta and request.dtype == torch.float32
        most, what = (MAX_HEAD_DIM_OF_DELTA32, " of the delta rule in float32") if narrow else (MAX_HEAD_DIM, "")
        if max(request.key_dim, request.value_dim) > most:
            return f"head dims{what} go up to {most}; given K = {request.key_dim}, V = {request.value_dim}"
        if request.chunk_size is not None and request.chunk_size > MAX_CHUNK:
            return f"chunks of more than {MAX_CHUNK} tokens do not fit; given chunk_size = {request.chunk_size}"
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
    ) -> LinearWork:
        """Take up a call."""
        from longctx.kernels.linear.triton.tile_table import table_of

        tiles = self.tiles or table_of(arch_of(q.device))
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        family = "delta" if beta is not None else "diagonal" if gate_of(g) == "diagonal" else "plain"
        entry = tiles.entry(family, q.dtype, q.shape[-1], v.shape[-1])
        size = entry.chunk if chunk_size is None else chunk_size
        if beta is not None:
            from longctx.kernels.linear.triton.delta import begin_delta

            return begin_delta(q, k, v, g=g, beta=beta, scale=scale, cuts=cuts, chunk_size=size, entry=entry)
        from longctx.kernels.linear.triton.decayed import DecayedWork

        return DecayedWork(q, k, v, g=g, scale=scale, cuts=cuts, chunk_size=size, entry=entry)
