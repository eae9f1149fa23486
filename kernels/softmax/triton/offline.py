"""Every kernel of the tile tables as launches: what to compile where the architecture is not there."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from longctx.kernels.contract import Scores, whole
from longctx.kernels.merge import empty_partial
from longctx.kernels.positions import Tile
from longctx.kernels.softmax.triton.tile_table import table_of
from longctx.kernels.softmax.triton_kernel import TritonKernel
from longctx.kernels.triton_common.launch import Launch, recorded

ARCHS = ("sm_80", "sm_90")


@dataclass(frozen=True)
class Configuration:
    """One line of a table, with or without a softcap, at head dims of its class (`head_dim` may be any of these)."""

    arch: str
    dtype: torch.dtype
    head_dim: int
    v_head_dim: int
    softcap: bool

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        cap = "-softcap" if self.softcap else ""
        return f"{self.arch}-softmax-{dtype}-{self.head_dim}-{self.v_head_dim}{cap}"


def configurations() -> Iterator[Configuration]:
    """Yield every configuration that the tables have, and head dims that are no powers of two, or differ."""
    for arch in ARCHS:
        for bits, size in table_of(arch).entries:
            dtype = torch.bfloat16 if bits == 16 else torch.float32
            for softcap in (False, True):
                yield Configuration(arch, dtype, size, size, softcap)
            for dims in {64: (), 128: ((96, 96), (128, 64)), 256: ((192, 192), (192, 128))}[size]:
                yield Configuration(arch, dtype, *dims, softcap=False)


def launches(configuration: Configuration) -> list[Launch]:
    """Return the launches of a forward and a backward pass: two KV heads of four heads each, a causal tile."""
    tokens, dtype = 256, configuration.dtype
    q, k = (torch.zeros(1, tokens, heads, configuration.head_dim, dtype=dtype) for heads in (8, 2))
    v, dout = (torch.zeros(1, tokens, heads, configuration.v_head_dim, dtype=dtype) for heads in (2, 8))
    work = whole([Tile(0, tokens, 0, tokens, 1 - tokens, 0)], heads=8, kv_heads=2)
    scores = Scores(softmax_scale=0.125, softcap=50.0 if configuration.softcap else None)
    kernel, partial = TritonKernel(tiles=table_of(configuration.arch)), empty_partial(q, v_head_dim=v.shape[-1])
    dq, dk, dv = (torch.zeros_like(x, dtype=torch.float32) for x in (q, k, v))
    rows = {"delta": partial.lse.clone(), "lse": partial.lse}
    with recorded() as found:
        kernel.forward(q, k, v, work=work, scores=scores, partial=partial)
        kernel.backward(q, k, v, work=work, scores=scores, dout=dout, **rows, dq=dq, dk=dk, dv=dv)
    return found
