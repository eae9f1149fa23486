"""Problems of linear attention, and the same computed three ways: by a kernel, by the reference, by plain torch.

What is compared is everything that one call gives: out, the states after segments, the summary, and the gradients of
q, k, v, g, beta and of the states that enter. Plain torch is the formula written out over all pairs of tokens, in the
dtype of the inputs: what the error budget of low precision is measured with (`tolerance.py`).
"""

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from longctx.kernels.linear.contract import Cuts, LinearKernel
from longctx.kernels.linear.reference import Reference
from longctx.kernels.linear.triton.tile_table import table_of
from longctx.kernels.linear.triton_kernel import TritonKernel
from longctx.kernels.triton_common.tile_table import Tile, TileTable
from tests.support.tolerance import GRADIENT_FACTOR, OUTPUT_FACTOR, assert_within_budget

GateShape = Literal["none", "fixed", "scalar", "diagonal"]
Gates = Literal["weak", "zero", "mixed"]


@dataclass(frozen=True)
class Case:
    """One problem.

    Attributes:
        lengths: tokens of each segment.
        documents: bounds of packed documents of each of the two rows, None = one document.
        key_dim, value_dim: not small, since the largest error of few numbers is a matter of luck.
        gates: `weak` (-0.5 to 0), `zero`, or `mixed`: 0, -20 and -1000 among weak ones.
    """

    gate: GateShape
    lengths: tuple[int, ...] = (37,)
    key_dim: int = 48
    value_dim: int = 33
    heads: int = 1
    chunk_size: int | None = 16
    documents: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    gates: Gates = "weak"
    dtype: torch.dtype = torch.float32
    delta: bool = False

    @property
    def tokens(self) -> int:
        """Return T."""
        return sum(self.lengths)

    def __str__(self) -> str:
        packed = "-packed" if self.documents else ""
        delta = "-delta" if self.delta else ""
        dims = f"K{self.key_dim}V{self.value_dim}"
        lengths = "+".join(map(str, self.lengths))
        return f"{self.gate}{delta}-{lengths}-{dims}-c{self.chunk_size}-{self.gates}{packed}-{self.dtype}".replace(
            "torch.", ""
        )


class Inputs(NamedTuple):
    """q, k `[B, T, H, K]`, v `[B, T, H, V]`, g, beta, states `[B, P, H, K, V]`."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor | None
    beta: Tensor | None
    states: Tensor

    def map(self, dtype: torch.dtype, state_dtype: torch.dtype) -> "Inputs":
        """Return leaves of other dtypes; g and states have their own."""

        def leaf(x: Tensor | None, to: torch.dtype) -> Tensor | None:
            return None if x is None else x.detach().to(to).requires_grad_()

        narrow = [leaf(x, dtype) for x in (self.q, self.k, self.v)]
        rest = leaf(self.g, state_dtype), leaf(self.beta, dtype), leaf(self.states, state_dtype)
        return Inputs(*narrow, *rest)  # type: ignore[arg-type]


def make_inputs(case: Case, device: torch.device) -> Inputs:
    """Return random inputs, rounded to the case's dtype; keys of the delta rule have length 1."""
    generator = torch.Generator().manual_seed(3)
    batch, heads, key, value = 2, case.heads, case.key_dim, case.value_dim

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    q, k = normal(batch, case.tokens, heads, key), normal(batch, case.tokens, heads, key)
    k = torch.nn.functional.normalize(k, dim=-1) if case.delta else k
    v, states = normal(batch, case.tokens, heads, value), normal(batch, len(case.lengths), heads, key, value)
    beta = torch.rand(batch, case.tokens, heads, generator=generator) if case.delta else None
    shapes = {"fixed": (heads,), "scalar": q.shape[:3], "diagonal": q.shape}
    g = None
    if case.gate != "none":
        g = -0.5 * torch.rand(shapes[case.gate], generator=generator)
        if case.gates == "zero":
            g = torch.zeros_like(g)
        elif case.gates == "mixed":
            draw = torch.rand(g.shape, generator=generator)
            for value_of_gate, below in ((-20.0, 0.3), (-1e3, 0.2), (0.0, 0.1)):
                g = torch.where(draw < below, value_of_gate, g)
    narrow = [x.to(case.dtype) for x in (q, k, v)]
    beta = None if beta is None else beta.to(case.dtype)
    inputs = Inputs(*narrow, g, beta, states)
    return Inputs(*(None if x is None else x.to(device) for x in inputs))  # type: ignore[arg-type]


def make_cuts(case: Case, device: torch.device) -> Cuts:
    """Return the segments as if they followed each other, with the documents of each row."""
    if case.documents is None:
        return Cuts(lengths=case.lengths)
    rows = torch.arange(case.tokens)
    documents = torch.stack([torch.bucketize(rows, torch.tensor(b[1:-1]), right=True) for b in case.documents])
    documents = documents.to(torch.int32)
    first = torch.tensor(Cuts(lengths=case.lengths).bounds[:-1])
    before = documents[:, (first - 1).clamp(min=0)]
    return Cuts(lengths=case.lengths, documents=documents.to(device), before=before.contiguous().to(device))


def outcome(
    kernel: LinearKernel, case: Case, inputs: Inputs, cuts: Cuts, *, chunk_size: int | None
) -> dict[str, Tensor]:
    """Return everything that a call gives, on the CPU, gradients of a random loss included."""
    q, k, v, g, beta, states = inputs
    work = kernel.begin(q, k, v, g=g, beta=beta, scale=case.key_dim**-0.5, cuts=cuts, chunk_size=chunk_size)
    summary = work.summary()
    out, final = work.finish(states)
    found = {"out": out, "final": final, "transition": summary.transition, "state": summary.state}
    return _with_gradients(found, inputs)


def plain(case: Case, inputs: Inputs, cuts: Cuts) -> dict[str, Tensor]:
    """Return the same by plain torch operations in the inputs' dtype: all pairs of tokens at once. Not for delta."""
    narrow = inputs.q.dtype
    q, k, v, g, _, states = inputs
    batch, tokens, heads, key_dim = q.shape
    same = torch.ones(1, tokens, tokens, dtype=torch.bool, device=q.device)
    kept = torch.ones(1, tokens, len(case.lengths), dtype=torch.bool, device=q.device)
    if cuts.documents is not None and cuts.before is not None:
        same = cuts.documents[:, :, None] == cuts.documents[:, None, :]
        kept = cuts.documents[:, :, None] == cuts.before[:, None, :]
    gates = q.new_zeros(1, 1, 1, 1, dtype=states.dtype) if g is None else g if g.dim() == 4 else g[..., None]
    gates = gates.expand(batch, tokens, heads, gates.shape[-1])
    outs, finals, maps, transitions = [], [], [], []
    for segment, (first, end) in enumerate(zip(cuts.bounds[:-1], cuts.bounds[1:], strict=True)):
        part = slice(first, end)
        rows = torch.arange(end - first, device=q.device)
        visible = same[:, part, part] & (rows[:, None] >= rows[None, :])
        sums = _sums_between(gates[:, part])  # [B, T, T, H, K or 1], of j+1 to i
        decay = torch.where(visible[..., None, None], sums.exp(), 0.0)
        from_begin = gates[:, part].cumsum(1).exp() * kept[:, part, segment, None, None]
        qs, ks, vs = q[:, part], k[:, part], v[:, part]
        scores = torch.einsum("bihd,bjhd,bijhd->bijh", qs, ks, decay.to(narrow).expand(-1, -1, -1, -1, key_dim))
        from_state = torch.einsum("bihd,bhdv->bihv", qs * from_begin.to(narrow), states[:, segment].to(narrow))
        outs.append((torch.einsum("bijh,bjhv->bihv", scores, vs) + from_state) * case.key_dim**-0.5)
        made = torch.einsum("bjhd,bjhv->bhdv", ks * decay[:, -1].to(narrow), vs).to(states.dtype)
        transition = from_begin[:, -1, :, :, None]
        maps.append(made)
        transitions.append(transition)
        finals.append(transition * states[:, segment] + made)
    found = {
        "out": torch.cat(outs, 1),
        "final": torch.stack(finals, 1),
        "transition": torch.stack(transitions, 1),
        "state": torch.stack(maps, 1),
    }
    return _with_gradients(found, inputs)


def _sums_between(gates: Tensor) -> Tensor:
    """Return `[B, T, T, ...]`: sums of gates `[B, T, ...]` over j + 1 to i, each added up from its own first one."""
    tokens = gates.shape[1]
    rows = torch.arange(tokens, device=gates.device)
    later = (rows[:, None] > rows[None, :])[None, :, :, None, None]
    return torch.where(later, gates[:, :, None], 0.0).cumsum(1)


def _with_gradients(found: dict[str, Tensor], inputs: Inputs) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    weights = {name: torch.randn(x.shape, generator=generator).to(x) for name, x in found.items()}
    weights["out"] = weights["out"].bfloat16().to(found["out"].dtype)  # the same dout in every dtype
    leaves = {name: x for name, x in inputs._asdict().items() if x is not None}
    used = [name for name in found if found[name].requires_grad]
    gradients = torch.autograd.grad(
        [found[name] for name in used],
        list(leaves.values()),
        [weights[name] for name in used],
        allow_unused=True,
    )
    named = {f"d{name}": x for name, x in zip(leaves, gradients, strict=True) if x is not None}
    return {name: x.detach().cpu() for name, x in (found | named).items()}


def compare(case: Case, device: str = "cpu", *, kernel: LinearKernel | None = None) -> dict[str, Tensor]:
    """Run a case three ways and assert that the kernel keeps within the error budget; return what it gave."""
    place = torch.device(device)
    given, cuts = make_inputs(case, place), make_cuts(case, place)
    ours = outcome(
        kernel or TritonKernel(), case, given.map(case.dtype, torch.float32), cuts, chunk_size=case.chunk_size
    )
    truth = outcome(Reference(), case, given.map(torch.float64, torch.float64), cuts, chunk_size=None)
    if case.delta:  # no closed form: the recurrence in the inputs' dtype is what torch can do
        torch_same = outcome(Reference(), case, given.map(case.dtype, torch.float32), cuts, chunk_size=None)
    else:
        torch_same = plain(case, given.map(case.dtype, torch.float32), cuts)
    assert ours.keys() == truth.keys() == torch_same.keys()
    for name, value in ours.items():
        factor = GRADIENT_FACTOR if name[0] == "d" else OUTPUT_FACTOR
        assert_within_budget(value, torch_same[name], truth[name].double(), factor=factor, name=f"{name} of {case}")
    return ours


def small_tiles() -> TileTable:
    """Return a table whose blocks are of 16, so that small head dims take several."""
    table = table_of("fallback")

    def narrow(tile: Tile) -> Tile:
        return replace(tile, key=16, value=16)

    entries = {
        key: replace(entry, tiles={name: narrow(tile) for name, tile in entry.tiles.items()})
        for key, entry in table.entries.items()
    }
    return TileTable("small", entries)
