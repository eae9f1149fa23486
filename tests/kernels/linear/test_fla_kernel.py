"""flash-linear-attention's adapter: against a stand-in for the package everywhere, against the package on a GPU.

The stand-in has the ops' signatures and refuses what they refuse, and computes with our recurrence, one sequence at a
time. So what is tested without a GPU is the adapter: which op, rows as sequences, `cu_seqlens`, states, summaries.
"""

import importlib.machinery
import sys
import types
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from longctx.kernels.linear import reference
from longctx.kernels.linear.contract import Cuts, LinearRequest, whole
from longctx.kernels.linear.fla_kernel import FlaKernel
from longctx.kernels.linear.op import linear_attention
from longctx.kernels.linear.reference import Reference
from tests.support.tolerance import GRADIENT_FACTOR, assert_within_budget

H, K, V = 2, 4, 3
KINDS = [(gate, delta) for gate in ("none", "fixed", "scalar", "diagonal") for delta in (False, True)]
OPS = {
    ("none", False): "chunk_simple_gla",
    ("fixed", False): "chunk_simple_gla",
    ("scalar", False): "chunk_simple_gla",
    ("diagonal", False): "chunk_gla",
    ("none", True): "chunk_delta_rule",
    ("fixed", True): "chunk_gated_delta_rule",
    ("scalar", True): "chunk_gated_delta_rule",
    ("diagonal", True): "chunk_kda",
}


class StandIn:
    """Modules `fla.ops.<folder>` with these ops; `calls` are (op, keyword arguments that were not None)."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict]] = []

    def chunk_simple_gla(self, q, k, v, g=None, g_gamma=None, scale=None, **rest):
        assert g is None or g_gamma is None
        assert g_gamma is None or not g_gamma.requires_grad
        return self._run("chunk_simple_gla", q, k, v, g_gamma if g is None else g, None, scale, **rest)

    def chunk_gla(self, q, k, v, g, scale=None, **rest):
        assert "chunk_size" not in rest
        assert g.shape == k.shape
        return self._run("chunk_gla", q, k, v, g, None, scale, **rest)

    def chunk_delta_rule(self, q, k, v, beta, scale=None, **rest):
        return self._run("chunk_delta_rule", q, k, v, None, beta, scale, **rest)

    def chunk_gated_delta_rule(self, q, k, v, g, beta, scale=None, **rest):
        assert g.shape == beta.shape
        return self._run("chunk_gated_delta_rule", q, k, v, g, beta, scale, **rest)

    def chunk_kda(self, q, k, v, g, beta, scale=None, **rest):
        assert g.shape == k.shape
        return self._run("chunk_kda", q, k, v, g, beta, scale, **rest)

    def _run(
        self,
        op,
        q,
        k,
        v,
        g,
        beta,
        scale,
        initial_state=None,
        output_final_state=False,
        cu_seqlens=None,
        chunk_size=None,
    ):
        assert output_final_state
        assert k.shape[-1] % 2 == 0
        assert v.shape[-1] % 2 == 0
        self.calls.append((op, {"cu_seqlens": cu_seqlens, "chunk_size": chunk_size, "batch": q.shape[0]}))
        rows, tokens = q.shape[:2]
        assert cu_seqlens is None or rows == 1
        bounds = list(range(0, rows * tokens + 1, tokens)) if cu_seqlens is None else cu_seqlens.tolist()
        assert initial_state is None or len(initial_state) == len(bounds) - 1
        per_token = {"q": q, "k": k, "v": v, "g": g, "beta": beta}
        outs, finals = [], []
        for number, (begin, end) in enumerate(pairwise(bounds)):
            x = {
                name: t if t is None or t.dim() == 1 else t.reshape(1, -1, *t.shape[2:])[:, begin:end]
                for name, t in per_token.items()
            }
            work = Reference().begin(
                x["q"],
                x["k"],
                x["v"],
                g=x["g"],
                beta=x["beta"],
                scale=scale,
                cuts=whole(end - begin),
                chunk_size=None,
            )
            out, final = work.finish(None if initial_state is None else initial_state[number][None, None])
            outs.append(out)
            finals.append(final[:, 0])
        return torch.cat(outs, dim=1).view(*v.shape), torch.cat(finals)


@pytest.fixture
def fla(monkeypatch):
    """Put the stand-in where the package would be."""
    stand_in = StandIn()
    folders = {"simple_gla": "chunk_simple_gla", "gla": "chunk_gla", "delta_rule": "chunk_delta_rule"}
    folders |= {"gated_delta_rule": "chunk_gated_delta_rule", "kda": "chunk_kda"}
    for name in ("fla", "fla.ops", *(f"fla.ops.{folder}" for folder in folders)):
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, loader=None)
        module.__path__ = []
        monkeypatch.setitem(sys.modules, name, module)
    for folder, op in folders.items():
        setattr(sys.modules[f"fla.ops.{folder}"], op, getattr(stand_in, op))
    return stand_in


def problem(gate, delta, *, batch=2, tokens=11, dtype=torch.float64, device="cpu", key=K, value=V) -> dict:
    """Return q, k, v, g, beta as leaves; keys of length 1 and decays of all sizes."""
    torch.manual_seed(0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    shapes = {"none": None, "fixed": (H,), "scalar": (batch, tokens, H), "diagonal": (batch, tokens, H, key)}
    q, k = torch.randn(2, batch, tokens, H, key, dtype=torch.float64).unbind()
    v = torch.randn(batch, tokens, H, value, dtype=torch.float64)
    k = torch.nn.functional.normalize(k, dim=-1)
    g = None if shapes[gate] is None else -torch.rand(shapes[gate], dtype=torch.float64)
    beta = torch.rand(batch, tokens, H, dtype=torch.float64) if delta else None
    leaves = {"q": q.to(dtype), "k": k.to(dtype), "v": v.to(dtype)}
    leaves |= {"g": None if g is None else g.to(wide), "beta": None if beta is None else beta.to(dtype)}
    return {n: None if t is None else t.to(device).requires_grad_() for n, t in leaves.items()}


def cuts(rows: int | None, lengths: tuple[int, ...]) -> Cuts:
    """Return segments, with documents of about three tokens of which some begin at a segment and some go on."""
    if rows is None:
        return Cuts(lengths=lengths)
    documents = torch.tensor([[7, 7, 7, 7, 8, 8, 8, 8, 9, 9, 10], [0, 0, 1, 1, 1, 1, 1, 2, 2, 2, 2]])[:rows].int()
    firsts = Cuts(lengths=lengths).bounds[:-1]
    before = documents[:, list(firsts)].clone()
    before[:, -1] -= 1  # the last segment begins a document
    return Cuts(lengths=lengths, documents=documents, before=before)


def everything(kernel, tensors: dict, cuts: Cuts, states: Tensor | None) -> dict[str, Tensor]:
    """Return summary, outputs, final states, and the gradients of all of them together."""
    work = kernel.begin(**tensors, scale=0.6, cuts=cuts, chunk_size=None)
    summary = work.summary()
    out, finals = work.finish(states)
    results = {"M": summary.transition, "R": summary.state, "out": out, "finals": finals}
    leaves = {n: t for n, t in {**tensors, "states": states}.items() if t is not None}
    generator = torch.Generator().manual_seed(4)
    loss = torch.zeros((), dtype=torch.float64, device=out.device)
    for result in results.values():
        weights = torch.randn(result.shape, generator=generator, dtype=torch.float64).to(result.device)
        loss = loss + (result.double() * weights).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return results | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def entering(lengths: tuple[int, ...], *, batch=2, device="cpu", dtype=torch.float64, key=K, value=V) -> Tensor:
    torch.manual_seed(9)
    return torch.randn(batch, len(lengths), H, key, value, dtype=dtype, device=device).requires_grad_()


@pytest.mark.parametrize("lengths", [(11,), (4, 7), (4, 4, 2, 1)])
@pytest.mark.parametrize("rows", [None, 1, 2], ids=["one document", "the same documents", "documents per row"])
@pytest.mark.parametrize(("gate", "delta"), KINDS)
def test_adapter_equals_the_reference(fla, gate, delta, rows, lengths):
    tensors, where = problem(gate, delta), cuts(rows, lengths)
    ours = everything(FlaKernel(), tensors, where, entering(lengths))
    ref = everything(Reference(), tensors, where, entering(lengths))
    assert {op for op, _ in fla.calls} == {OPS[gate, delta]}
    for name, expected in ref.items():
        assert ours[name].shape == expected.shape
        torch.testing.assert_close(ours[name], expected, rtol=0, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


def test_without_states_and_with_odd_keys(fla):
    tensors, where = problem("diagonal", True, key=5, value=2), cuts(2, (4, 7))
    for ours, ref in zip(
        *(
            kernel.begin(**tensors, scale=1.0, cuts=where, chunk_size=None).finish(None)
            for kernel in (FlaKernel(), Reference())
        ),
        strict=True,
    ):
        torch.testing.assert_close(ours, ref, rtol=0, atol=1e-12)


def test_equal_sequences_are_a_batch_and_others_are_packed(fla):
    tensors = problem("scalar", False, tokens=12)
    for lengths, batch, bounds in (((12,), 2, None), ((6, 6), 4, None), ((8, 4), 1, [0, 8, 12, 20, 24])):
        fla.calls.clear()
        FlaKernel().begin(**tensors, scale=1.0, cuts=Cuts(lengths=lengths), chunk_size=32).finish(None)
        ((_, call),) = fla.calls
        assert call["batch"] == batch
        assert call["chunk_size"] == 32
        assert (None if call["cu_seqlens"] is None else call["cu_seqlens"].tolist()) == bounds


def test_a_fixed_decay_that_is_not_learned_stays_one_number_per_head(fla, monkeypatch):
    tensors = problem("fixed", False)
    given = []
    original = fla.chunk_simple_gla
    monkeypatch.setattr(
        sys.modules["fla.ops.simple_gla"],
        "chunk_simple_gla",
        lambda *args, **named: given.append(named) or original(*args, **named),
    )
    for learned in (False, True):
        g = tensors["g"].detach().requires_grad_(learned)
        FlaKernel().begin(**{**tensors, "g": g}, scale=1.0, cuts=cuts(None, (11,)), chunk_size=None).finish(None)
    assert given[0]["g"] is None
    assert given[0]["g_gamma"].shape == (H,)
    assert given[1]["g"].shape == (2, 11, H)
    assert given[1]["g_gamma"] is None


def request(**changes) -> LinearRequest:
    given = {
        "device_type": "cuda",
        "dtype": torch.bfloat16,
        "gate": "scalar",
        "delta": True,
        "key_dim": 64,
        "value_dim": 65,
    }
    return LinearRequest(**(given | changes))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device_type": "cpu"}, "needs a CUDA device; the tensors are on cpu"),
        ({"dtype": torch.float64}, "given float64"),
        ({"dtype": torch.float32, "gate": "none"}, "16-bit inputs only"),
        ({"key_dim": 512}, "key dims up to 256; given 512"),
        ({"chunk_size": 48}, "chunks of 16, 32, 64 tokens; given 48"),
        ({"gate": "diagonal", "chunk_size": 16}, "chunks of 32, 64 tokens; given 16"),
        ({"gate": "diagonal", "delta": False, "chunk_size": 64}, "no choice of chunk_size"),
        ({}, None),
        ({"chunk_size": 16}, None),
        ({"delta": False, "key_dim": 512, "dtype": torch.float32}, None),
    ],
)
def test_what_it_cannot_do_it_says(fla, changes, reason):
    given = FlaKernel().unsupported(request(**changes))
    assert given is None if reason is None else reason in given


def test_without_the_package_it_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "fla", None)
    monkeypatch.setattr(sys.modules[FlaKernel.__module__], "find_spec", lambda name: None)
    assert "not installed (pip install 'longctx[fla]')" in FlaKernel().unsupported(request())
    tensors = problem("none", False)
    with pytest.raises(ValueError, match="kernel fla cannot serve this linear attention: .* not installed"):
        linear_attention(tensors["q"], tensors["k"], tensors["v"], kernel="fla")


def compare_with_the_package(gate, delta, rows, *, device, dtype, key, value) -> None:
    """Hold the package's results to twice the error of the recurrence in 16 bits, gradients to three times that."""
    lengths, size = (4, 7), {"key": key, "value": value}
    tensors, where = problem(gate, delta, dtype=dtype, device=device, **size), cuts(rows, lengths)
    if where.documents is not None:
        where = Cuts(lengths=lengths, documents=where.documents.to(device), before=where.before.to(device))
    states = entering(lengths, device=device, dtype=torch.float32, **size)

    def recurrence(dtype: torch.dtype) -> dict[str, Tensor]:
        leaves = {n: None if t is None else t.detach().to(dtype).requires_grad_() for n, t in tensors.items()}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reference, "state_dtype", lambda q: dtype)
            return everything(Reference(), leaves, where, states.detach().to(dtype).requires_grad_())

    ours, plain, ref = everything(FlaKernel(), tensors, where, states), recurrence(dtype), recurrence(torch.float64)
    for name, expected in ref.items():
        factor = {"factor": GRADIENT_FACTOR} if name.startswith("d") else {}
        assert_within_budget(ours[name], plain[name], expected, name=name, **factor)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [None, 2])
@pytest.mark.parametrize(("gate", "delta"), KINDS)
def test_the_package_itself_is_within_the_budget(gate, delta, rows):
    pytest.importorskip("fla", reason="flash-linear-attention is not installed")
    compare_with_the_package(gate, delta, rows, device="cuda", dtype=torch.bfloat16, key=64, value=65)
