"""Every kernel of the tile tables as launches: what to compile where the architecture is not there."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from longctx.kernels.block_sparse.contract import Weights
from longctx.kernels.block_sparse.selection import selected_blocks
from longctx.kernels.block_sparse.triton.tile_table import table_of
from longctx.kernels.block_sparse.triton_kernel import TritonSparseKernel
from longctx.kernels.contract import Scores
from longctx.kernels.merge import empty_partial
from longctx.kernels.triton_common.launch import Launch, recorded

ARCHS = ("sm_80", "sm_90")


@dataclass(frozen=True)
class Configuration:
    """One line of a table at head dims of its class (`head_dim` may be any of these), and what it is used for."""

    arch: str
    dtype: torch.dtype
    head_dim: int
    v_head_dim: int
    weights: Weights = "softmax"
    softcap: bool = False
    block_size: int = 64

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        cap = "-softcap" if self.softcap else ""
        return f"{self.arch}-sparse-{self.weights}-{dtype}-{self.head_dim}-{self.v_head_dim}-{self.block_size}{cap}"


def configurations() -> Iterator[Configuration]:
    """Yield every configuration that the tables have, and head dims that are no powers of two, or differ."""
    for arch in ARCHS:
        for bits, size in table_of(arch).entries:
            dtype = torch.bfloat16 if bits == 16 else torch.float32
            for weights in ("softmax", "gated", "sum"):
                yield Configuration(arch, dtype, size, size, weights)
            yield Configuration(arch, dtype, size, size, softcap=True)
            for block_size in (512, 40):  # several blocks of keys; a part of one
                yield Configuration(arch, dtype, size, size, block_size=block_size)
            for dims in {64: (), 128: ((96, 96), (128, 64)), 256: ((192, 192), (192, 128))}[size]:
                yield Configuration(arch, dtype, *dims)


def launches(configuration: Configuration) -> list[Launch]:
    """Return the launches of a forward and a backward pass, one of each kind: two KV heads of four heads each.

    Each query sees the first block and its own one up to itself: there are whole tiles and others.
    """
    size, dtype, weights = configuration.block_size, configuration.dtype, configuration.weights
    tokens = 3 * size
    q, k = (torch.zeros(1, tokens, heads, configuration.head_dim, dtype=dtype) for heads in (8, 2))
    v, dout = (torch.zeros(1, tokens, heads, configuration.v_head_dim, dtype=dtype) for heads in (2, 8))
    place = torch.arange(tokens)
    own = place // size
    blocks = torch.stack([torch.where(own > 0, 0, -1), own], dim=-1)[None, :, None].expand(1, tokens, 2, 2)
    selection = selected_blocks(
        blocks, block_size=size, positions=place, first=torch.zeros(1, tokens, dtype=torch.int64)
    )
    gates = torch.zeros(1, tokens, 8, 2, dtype=dtype) if weights == "gated" else None
    scores = Scores(softmax_scale=0.125, softcap=50.0 if configuration.softcap else None)
    kernel, partial = TritonSparseKernel(tiles=table_of(configuration.arch)), empty_partial(q, v_head_dim=v.shape[-1])
    dq, dk, dv = (torch.zeros_like(x, dtype=torch.float32) for x in (q, k, v))
    dgates = None if gates is None else torch.zeros_like(gates, dtype=torch.float32)
    what: dict[str, Any] = {"selection": selection, "k_positions": place, "scores": scores}
    what |= {"weights": weights, "gates": gates}
    grads: dict[str, Any] = {"dq": dq, "dk": dk, "dv": dv, "dgates": dgates}
    with recorded() as found:
        kernel.forward(q, k, v, **what, partial=partial)
        kernel.backward(q, k, v, **what, dout=dout, delta=partial.lse, lse=partial.lse, **grads)
    return list({(each.kernel.__name__, each.arguments.get("MASKED")): each for each in found}.values())
