"""Problems of linear attention, and everything that a kernel makes of one: values and gradients."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import normalize

from longctx.kernels.linear.contract import Cuts, LinearKernel

GATES = ("none", "fixed", "scalar", "diagonal")
VALUES = ("zero", "strong", "extreme", "mixed", "ordinary")
NAMES = ("q", "k", "v", "g", "beta", "states")


@dataclass(frozen=True)
class Problem:
    """Tensors as in `LinearKernel.begin`, and states that enter the segments."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor | None
    beta: Tensor | None
    states: Tensor | None
    cuts: Cuts

    def to(self, dtype: torch.dtype, *, wide: torch.dtype) -> "Problem":
        """Return it with q, k, v, beta in a dtype, gates and states in the wide one."""
        beta = None if self.beta is None else self.beta.to(dtype)
        g, states = (None if x is None else x.to(wide) for x in (self.g, self.states))
        return replace(self, q=self.q.to(dtype), k=self.k.to(dtype), v=self.v.to(dtype), g=g, beta=beta, states=states)


def problem(
    *,
    gate: str,
    delta: bool,
    lengths: tuple[int, ...],
    values: str = "ordinary",
    packed: bool = False,
    entered: bool = True,
    batch: int = 2,
    heads: int = 2,
    key_dim: int = 5,
    value_dim: int = 3,
    rows: int | None = None,
    seed: int = 0,
) -> Problem:
    """Return a float64 problem.

    Args:
        values: of the log gates.
        packed: documents of 1 to 40 tokens, other ones in each row, some begin with a segment.
        entered: whether states enter.
        rows: of documents, default one per sequence.
    """
    random = torch.Generator().manual_seed(seed)
    tokens = sum(lengths)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64)

    shape = {"none": None, "fixed": (heads,), "scalar": (batch, tokens, heads)}.get(
        gate, (batch, tokens, heads, key_dim)
    )
    return Problem(
        q=normal(batch, tokens, heads, key_dim),
        k=normalize(normal(batch, tokens, heads, key_dim), dim=-1) if delta else normal(batch, tokens, heads, key_dim),
        v=normal(batch, tokens, heads, value_dim),
        g=None if shape is None else _gates(values, shape, random),
        beta=torch.rand(batch, tokens, heads, generator=random, dtype=torch.float64) if delta else None,
        states=normal(batch, len(lengths), heads, key_dim, value_dim) if entered else None,
        cuts=_packed(lengths, batch if rows is None else rows, random) if packed else Cuts(lengths=lengths),
    )


def _gates(values: str, shape: tuple[int, ...], random: torch.Generator) -> Tensor:
    ordinary = -0.3 * torch.rand(shape, generator=random, dtype=torch.float64)
    constant = {"zero": 0.0, "strong": -20.0, "extreme": -1e3}
    if values in constant:
        return torch.full_like(ordinary, constant[values])
    if values == "mixed":
        which = torch.randint(0, 6, shape, generator=random)
        for i, value in enumerate(constant.values()):
            ordinary = torch.where(which == i, value, ordinary)
    return ordinary


def _packed(lengths: tuple[int, ...], rows: int, random: torch.Generator) -> Cuts:
    tokens = sum(lengths)
    documents = torch.zeros(rows, tokens, dtype=torch.int32)
    for row in documents:
        start, number = 0, 3
        while start < tokens:
            end = start + int(torch.randint(1, 41, (), generator=random))
            row[start:end] = number
            start, number = end, number + 1
    firsts = [sum(lengths[:i]) for i in range(len(lengths))]
    begins = torch.rand(rows, len(lengths), generator=random) < 0.3
    return Cuts(lengths=lengths, documents=documents, before=documents[:, firsts] - begins.int())


def everything(
    kernel: LinearKernel,
    given: Problem,
    *,
    chunk_size: int | None = None,
    summed: bool = False,
    scale: float = 0.4,
    seed: int = 7,
) -> dict[str, Tensor]:
    """Return out, final states, with `summed` the summary, and all inputs' gradients under random cotangents."""
    inputs = [
        x if x is None else x.clone().requires_grad_()
        for x in (given.q, given.k, given.v, given.g, given.beta, given.states)
    ]
    q, k, v, g, beta, states = inputs
    assert q is not None and k is not None and v is not None
    work = kernel.begin(q, k, v, g=g, beta=beta, scale=scale, cuts=given.cuts, chunk_size=chunk_size)
    found = {}
    if summed:
        summary = work.summary()
        found = {"transition": summary.transition, "made": summary.state}
    found["out"], found["final"] = work.finish(states)
    random = torch.Generator().manual_seed(seed)
    pairs = [(x, torch.randn(x.shape, generator=random, dtype=torch.float64).to(x.dtype)) for x in found.values()]
    outputs, cotangents = zip(*(pair for pair in pairs if pair[0].requires_grad), strict=True)
    wanted = {name: x for name, x in zip(NAMES, inputs, strict=True) if x is not None}
    grads = torch.autograd.grad(outputs, list(wanted.values()), cotangents, materialize_grads=True, allow_unused=True)
    found.update({f"d{name}": grad for name, grad in zip(wanted, grads, strict=True)})
    return {name: x.detach() for name, x in found.items()}
