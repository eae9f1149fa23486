"""The delta rule's Triton kernels under the interpreter, against the recurrence in float64.

The budget is the error of plain torch in the same dtype: for float32 the chunks of `TorchKernel`; for 16 bits the
recurrence with states in float32, and everything that is multiplied, and what comes of it, in the dtype of the inputs.
Identical keys with beta = 1 are worse than that in chunks: what the recurrence keeps small from token to token is there
a difference of sums over the chunk, which 16 bits round before it is taken. Such a case has a `slack` of its own.
Everything that kernels are to write is full of NaN at first (`triton_worker`).
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from longctx.kernels.linear.contract import Cuts
from longctx.kernels.linear.reference import Reference
from longctx.kernels.linear.torch_kernel import TorchKernel
from longctx.kernels.linear.triton_kernel import TritonKernel
from tests.support.tolerance import GRADIENT_FACTOR, OUTPUT_FACTOR, assert_within_budget
from tests.support.triton_worker import Worker, interpreter

__all__ = ["interpreter"]  # a fixture
GATES = ("none", "fixed", "scalar", "diagonal")
DRAWS = 6  # of a problem, which show plain torch's error


@dataclass(frozen=True)
class Case:
    """A problem: tokens of each segment, tokens of each document of each row (None = one document), dims.

    Log decays are drawn from `gates` with equal odds, and a normal number's square is taken off those that are not 0.
    """

    gate: str
    dtype: torch.dtype = torch.float32
    lengths: tuple[int, ...] = (45,)
    documents: tuple[tuple[int, ...], ...] | None = None
    key_dim: int = 20
    value_dim: int = 16
    chunk_size: int = 16
    gates: tuple[float, ...] = (-0.1,)
    initial: bool = True
    same_keys: bool = False
    slack: float = 1.0

    def __str__(self) -> str:
        """Return what differs between cases."""
        lengths, dtype = "+".join(map(str, self.lengths)), str(self.dtype).removeprefix("torch.")
        packed, same = "-packed" if self.documents else "", "-same" if self.same_keys else ""
        return f"{self.gate}-{dtype}-{lengths}-{'/'.join(map(str, self.gates))}-c{self.chunk_size}{packed}{same}"

    def cuts(self, device: torch.device) -> Cuts:
        """Return the cuts; the token before every second segment is one of another document, elsewhere."""
        if self.documents is None:
            return Cuts(lengths=self.lengths)
        rows = [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in self.documents]
        documents = torch.stack(rows).to(torch.int32)
        before = [documents[:, 0]]
        for segment in range(1, len(self.lengths)):
            last = documents[:, sum(self.lengths[:segment]) - 1]
            before.append(torch.full_like(last, -7) if segment % 2 else last)
        return Cuts(lengths=self.lengths, documents=documents.to(device), before=torch.stack(before, dim=1).to(device))

    def tensors(self) -> dict[str, Tensor]:
        """Return inputs and cotangents, in the dtypes that the kernel takes."""
        batch, tokens, heads, size = 2, sum(self.lengths), 2, self.key_dim

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape).to(self.dtype)

        k = torch.nn.functional.normalize(torch.randn(batch, 1 if self.same_keys else tokens, heads, size), dim=-1)
        x = {
            "q": draw(batch, tokens, heads, size),
            "k": k.expand(batch, tokens, heads, size).to(self.dtype),
            "v": draw(batch, tokens, heads, self.value_dim),
            "beta": torch.ones(batch, tokens, heads) if self.same_keys else torch.rand(batch, tokens, heads),
        }
        x["beta"] = x["beta"].to(self.dtype)
        shapes = {"fixed": (heads,), "scalar": (batch, tokens, heads), "diagonal": (batch, tokens, heads, size)}
        if self.gate != "none":
            chosen = torch.tensor(self.gates)[torch.randint(len(self.gates), shapes[self.gate])]
            x["g"] = torch.where(chosen == 0, 0.0, chosen - torch.randn(chosen.shape).square())
        state = batch, len(self.lengths), heads, size, self.value_dim
        if self.initial:
            x["states"] = torch.randn(state)
        x |= {"out": draw(*x["v"].shape), "final": torch.randn(state)}
        return x | {"transition": torch.randn(*state[:-1], size), "state": torch.randn(state)}


class PlainWork:
    """The recurrence in plain torch with 16-bit products: what is multiplied is rounded, and what comes of it too."""

    def __init__(self, x: dict[str, Tensor], *, scale: float, cuts: Cuts) -> None:
        self.x, self.scale, self.cuts = x, scale, cuts

    def run(self, values: Tensor, segment: int, state: Tensor) -> tuple[Tensor, Tensor]:
        """Return outputs and the last state of a segment."""
        x, low, (first, end) = self.x, self.x["q"].dtype, self.cuts.bounds[segment : segment + 2]
        outs = []
        for t in range(first, end):
            if self.cuts.documents is not None and self.cuts.before is not None:
                last = self.cuts.before[:, segment] if t == first else self.cuts.documents[:, t - 1]
                state = torch.where((self.cuts.documents[:, t] == last)[:, None, None, None], state, 0.0)
            if "g" in x:
                g = x["g"] if x["g"].dim() == 1 else x["g"][:, t]
                state = state * torch.exp(g if g.dim() == 3 else g[..., None])[..., None]
            key = x["k"][:, t, :, :, None]
            made = x["beta"][:, t, :, None, None] * (values[:, t, :, None] - key.mT @ state.to(low))
            query = self.scale * x["q"][:, t, :, None]
            outs.append(
                (query @ state.to(low) + (query @ key) @ made)[:, :, 0]
            )  # scores are rounded, as attention's are
            state = state + (key @ made).float()
        return torch.stack(outs, dim=1), state

    def results(self) -> dict[str, Tensor]:
        """Return out, the final states and the summary."""
        q, v, segments = self.x["q"], self.x["v"], range(len(self.cuts.lengths))
        batch, _, heads, size = q.shape
        none = torch.zeros(batch, heads, size, v.shape[-1])
        one = torch.eye(size).expand(batch, heads, size, size)
        entering = [self.x["states"][:, p] if "states" in self.x else none for p in segments]
        outs, finals = zip(*(self.run(v, p, entering[p]) for p in segments), strict=True)
        transitions = [self.run(torch.zeros_like(q), p, one)[1] for p in segments]
        states = [self.run(v, p, none)[1] for p in segments]
        stacked = (torch.stack(part, dim=1) for part in (finals, transitions, states))
        return {"out": torch.cat(outs, dim=1), **dict(zip(("final", "transition", "state"), stacked, strict=True))}


def results(kernel: Reference | TorchKernel | TritonKernel, case: Case, x: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return out, the final states and the summary of a kernel."""
    work = kernel.begin(
        x["q"],
        x["k"],
        x["v"],
        g=x.get("g"),
        beta=x["beta"],
        scale=0.3,
        cuts=case.cuts(x["q"].device),
        chunk_size=None if isinstance(kernel, Reference) else case.chunk_size,
    )
    out, final = work.finish(x.get("states"))
    summary = work.summary()
    return {"out": out, "final": final, "transition": summary.transition, "state": summary.state}


def plainly(case: Case, x: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the same by plain torch in the dtype of the inputs."""
    if case.dtype == torch.float32:
        return results(TorchKernel(), case, x)
    return PlainWork(x, scale=0.3, cuts=case.cuts(x["q"].device)).results()


def everything(
    compute: Callable[[dict[str, Tensor]], dict[str, Tensor]], x: dict[str, Tensor], parts: tuple[str, ...]
) -> dict[str, Tensor]:
    """Return results and, through these of them, gradients."""
    names = [name for name in x if name in ("q", "k", "v", "g", "beta", "states")]
    leaves: dict[str, Tensor] = {name: x[name].detach().clone().requires_grad_() for name in names}
    made = compute({**x, **leaves})
    gradients = torch.autograd.grad(
        [made[part] for part in parts],
        list(leaves.values()),
        [x[part].to(made[part].dtype) for part in parts],
        allow_unused=True,
    )
    found = {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True) if gradient is not None}
    return {**{part: made[part].detach() for part in parts}, **found}


def compare(case: Case, parts: tuple[str, ...], device: str = "cpu") -> None:
    """Compare the kernels on a device with the recurrence on the CPU."""
    given = [case.tensors() for _ in range(DRAWS)]
    there = {name: tensor.to(device) for name, tensor in given[0].items()}
    ours = everything(lambda y: results(TritonKernel(), case, y), there, parts)
    exact = [everything(lambda y: results(Reference(), case, y), to_double(x), parts) for x in given]
    plain = [everything(lambda y: plainly(case, y), x, parts) for x in given]
    assert ours.keys() >= exact[0].keys()
    assert all(ours[name].eq(0).all() for name in ours.keys() - exact[0].keys()), "q has no part in the summary"
    for name in exact[0]:
        factor = (OUTPUT_FACTOR if name in parts else GRADIENT_FACTOR) * case.slack
        draws = [(x[name], y[name]) for x, y in zip(plain, exact, strict=True)]
        assert_within_budget(ours[name].cpu(), *draws[0], factor=factor, name=name, more=draws[1:])


def to_double(x: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the same numbers in float64."""
    return {name: tensor.double() for name, tensor in x.items()}


PACKED = ((5, 12, 1, 8), (15, 11))
OUTPUTS, SUMMARY = ("out", "final"), ("transition", "state")
MIXED = (0.0, -20.0, -0.1, -1000.0)
CASES = [
    *(Case(gate, lengths=(17, 1, 8), documents=PACKED) for gate in GATES),
    *(Case(gate, torch.bfloat16, lengths=(17, 1, 8), documents=PACKED) for gate in ("scalar", "diagonal")),
    Case("none", lengths=(37,), key_dim=32, value_dim=20, chunk_size=32, initial=False),
]
EXTREME = [
    *(Case(gate, dtype, gates=MIXED) for gate in ("scalar", "diagonal") for dtype in (torch.float32, torch.bfloat16)),
    *(Case(gate, gates=(0.0,)) for gate in ("scalar", "diagonal")),
    Case("scalar", gates=(-20.0,)),
    Case("none", torch.float16, lengths=(30,), same_keys=True, slack=2.0),
    Case("scalar", lengths=(7, 23), key_dim=3, value_dim=1, chunk_size=10),
    Case("diagonal", torch.bfloat16, lengths=(70, 30), key_dim=32, value_dim=32, chunk_size=64),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs(interpreter: Worker, case: Case) -> None:
    interpreter.run(compare, case, OUTPUTS)


@pytest.mark.parametrize("case", [CASES[2], CASES[5]], ids=str)
def test_summary(interpreter: Worker, case: Case) -> None:
    interpreter.run(compare, case, SUMMARY)


@pytest.mark.slow
@pytest.mark.parametrize("parts", [OUTPUTS, SUMMARY], ids=["outputs", "summary"])
@pytest.mark.parametrize("case", EXTREME, ids=str)
def test_extremes(interpreter: Worker, case: Case, parts: tuple[str, ...]) -> None:
    interpreter.run(compare, case, parts)


@pytest.mark.gpu
@pytest.mark.parametrize("parts", [OUTPUTS, SUMMARY], ids=["outputs", "summary"])
@pytest.mark.parametrize("case", [*CASES, *EXTREME], ids=str)
def test_on_a_device(case: Case, parts: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    compare(case, parts, "cuda")
