"""The recurrence against sums over all pairs of tokens, and against itself cut in two."""

import pytest
import torch
from torch import Tensor

from longctx.kernels.linear.affine import Affine
from longctx.kernels.linear.contract import Cuts, gate_of
from longctx.kernels.linear.reference import Reference
from tests.kernels.linear.linear_cases import GATES, Problem, problem


def all_pairs(given: Problem, *, scale: float) -> Tensor:
    """Return `o_i = scale sum_j (q_i * exp(g_j+1 + ... + g_i)).k_j v_j` over the pairs of a document."""
    batch, tokens, heads, size = given.q.shape
    g = torch.zeros(()) if given.g is None else given.g
    g = (g[..., None] if gate_of(given.g) in ("fixed", "scalar") else g).expand(batch, tokens, heads, size)
    out = torch.zeros_like(given.v)
    for i in range(tokens):
        for j in range(i + 1):
            decay = torch.exp(g[:, j + 1 : i + 1].sum(1))
            score = scale * (given.q[:, i] * decay * given.k[:, j]).sum(-1, keepdim=True)  # [B, H, 1]
            if given.cuts.documents is not None:
                score = score * (given.cuts.documents[:, i] == given.cuts.documents[:, j])[:, None, None]
            out[:, i] += score * given.v[:, j]
    return out


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("gate", GATES)
def test_equals_the_sum_over_pairs(gate: str, packed: bool) -> None:
    given = problem(gate=gate, delta=False, lengths=(37,), packed=packed, entered=False)
    work = Reference().begin(
        given.q, given.k, given.v, g=given.g, beta=None, scale=0.3, cuts=given.cuts, chunk_size=None
    )
    torch.testing.assert_close(work.finish(None)[0], all_pairs(given, scale=0.3), rtol=0, atol=1e-12)


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("gate", GATES)
def test_maps_of_segments_compose(gate: str, delta: bool) -> None:
    given = problem(gate=gate, delta=delta, lengths=(11, 14), entered=False)

    def summary(cuts: Cuts) -> Affine:
        return (
            Reference()
            .begin(given.q, given.k, given.v, g=given.g, beta=given.beta, scale=1.0, cuts=cuts, chunk_size=None)
            .summary()
        )

    parts, whole = summary(given.cuts), summary(Cuts(lengths=(25,)))
    first, second = (Affine(parts.transition[:, i], parts.state[:, i]) for i in (0, 1))
    composed = second.after(first)
    torch.testing.assert_close(composed.transition, whole.transition[:, 0], rtol=0, atol=1e-12)
    torch.testing.assert_close(composed.state, whole.state[:, 0], rtol=0, atol=1e-12)


def test_the_delta_rule_replaces_the_value_under_a_key() -> None:
    key = torch.tensor([0.6, 0.8], dtype=torch.float64)
    k, v = key.expand(1, 2, 1, 2), torch.tensor([3.0, -5.0], dtype=torch.float64).view(1, 2, 1, 1)
    beta = torch.ones(1, 2, 1, dtype=torch.float64)
    work = Reference().begin(k, k, v, g=None, beta=beta, scale=1.0, cuts=Cuts(lengths=(2,)), chunk_size=None)
    torch.testing.assert_close(work.finish(None)[0], v)  # without beta the second would be -2
