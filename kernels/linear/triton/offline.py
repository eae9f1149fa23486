"""Every kernel of the tile tables as launches: what to compile where the architecture is not there."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from longctx.kernels.linear.contract import Gate, whole
from longctx.kernels.linear.triton.tile_table import table_of
from longctx.kernels.linear.triton_kernel import TritonKernel
from longctx.kernels.triton_common.launch import Launch, recorded

ARCHS = ("sm_80", "sm_90")
# Family of the tile table -> its gates. Fixed decays use the kernels of scalar ones.
GATES: dict[str, tuple[Gate, ...]] = {
    "plain": ("none", "scalar"),
    "diagonal": ("diagonal",),
    "delta": ("none", "scalar", "diagonal"),
}


@dataclass(frozen=True)
class Configuration:
    """One line of a table, with one gate and one dtype, at its class's head dims."""

    arch: str
    family: str
    gate: Gate
    dtype: torch.dtype
    head_dim: int

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.arch}-{self.family}-{self.gate}-{dtype}-{self.head_dim}"


def configurations(families: tuple[str, ...] = tuple(GATES)) -> Iterator[Configuration]:
    """Yield every configuration that the tables have."""
    for arch in ARCHS:
        for family, bits, head_dim in table_of(arch).entries:
            if family in families:
                for gate in GATES[family]:
                    dtype = torch.bfloat16 if bits == 16 else torch.float32
                    yield Configuration(arch, family, gate, dtype, head_dim)


def launches(configuration: Configuration) -> list[Launch]:
    """Return the launches of a forward and a backward pass, summary included, each kernel and set of constants once.

    There are two segments' worth of work in every kernel: packed documents, two chunks, an entering state.
    """
    size, gate, tokens, heads = configuration.head_dim, configuration.gate, 128, 16
    q, k, v = (torch.zeros(1, tokens, heads, size, dtype=configuration.dtype, requires_grad=True) for _ in range(3))
    shape = {"none": None, "fixed": (heads,), "scalar": (1, tokens, heads), "diagonal": (1, tokens, heads, size)}[gate]
    g = None if shape is None else torch.zeros(shape, requires_grad=True)
    beta = torch.zeros(1, tokens, heads, dtype=q.dtype, requires_grad=True) if configuration.family == "delta" else None
    states = torch.zeros(1, 1, heads, size, size, requires_grad=True)
    kernel = TritonKernel(tiles=table_of(configuration.arch))
    with recorded() as found:
        cuts = whole(tokens, (0, 100, tokens))
        work = kernel.begin(q, k, v, g=g, beta=beta, scale=1.0, cuts=cuts, chunk_size=None)
        summary = work.summary()
        out, final = work.finish(states)
        (out.float().sum() + final.sum() + summary.state.sum() + summary.transition.sum()).backward()
    unique: dict[object, Launch] = {}
    for launch in found:
        constants = {name: x for name, x in launch.arguments.items() if not isinstance(x, torch.Tensor)}
        unique.setdefault(
            (launch.kernel.__name__, launch.warps, launch.stages, repr(sorted(constants.items()))), launch
        )
    return list(unique.values())
