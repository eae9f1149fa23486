"""The op on one device: kernels by name, what is refused, documents, initial states."""

import pytest
import torch

from longctx.kernels.linear.op import KERNELS, linear_attention, linear_request, resolve_kernel
from tests.kernels.linear.linear_cases import problem


def test_auto_is_torch_on_a_cpu() -> None:
    given = problem(gate="scalar", delta=True, lengths=(5,))
    request = linear_request(given.q, given.k, given.v, g=given.g, beta=given.beta, chunk_size=None)
    assert resolve_kernel("auto", request).name == "torch"
    assert "auto" in KERNELS


def test_kernels_agree_on_documents_and_states() -> None:
    given = problem(gate="diagonal", delta=True, lengths=(50,))
    assert given.states is not None
    out, final = zip(
        *(
            linear_attention(
                given.q,
                given.k,
                given.v,
                g=given.g,
                beta=given.beta,
                initial_state=given.states[:, 0],
                cu_seqlens=(0, 7, 8, 50),
                kernel=kernel,
            )
            for kernel in ("torch", "reference")
        ),
        strict=True,
    )
    torch.testing.assert_close(out[0], out[1], rtol=0, atol=1e-11)
    torch.testing.assert_close(final[0], final[1], rtol=0, atol=1e-11)


def test_documents_after_the_first_do_not_see_the_initial_state() -> None:
    given = problem(gate="none", delta=False, lengths=(20,))
    assert given.states is not None
    without, _ = linear_attention(given.q, given.k, given.v, cu_seqlens=(0, 6, 20))
    with_state, _ = linear_attention(given.q, given.k, given.v, cu_seqlens=(0, 6, 20), initial_state=given.states[:, 0])
    changed = (with_state - without).abs().amax(dim=(0, 2, 3)) > 0
    assert changed.tolist() == [True] * 6 + [False] * 14


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernel": "nope"}, "'nope' of linear attention is not known; known are auto, torch"),
        ({"kernel": "reference", "chunk_size": 8}, "kernel reference cannot serve .* chunk_size"),
        ({"chunk_size": 24}, "power of 2; given 24"),
        ({"chunk_size": 0}, "chunk_size must be >= 1"),
        ({"cu_seqlens": (0, 3)}, "from 0 to 10"),
        ({"g": torch.zeros(2, 10)}, r"g must be \[H\] = \[2\]"),
        ({"g": torch.zeros(2)}, "never 16-bit|g must be torch.float64"),
        ({"beta": torch.zeros(2, 10)}, r"beta must be \[B, T, H\]"),
    ],
)
def test_refusals(change: dict, message: str) -> None:
    given = problem(gate="diagonal", delta=False, lengths=(10,))
    with pytest.raises(ValueError, match=message):
        linear_attention(given.q, given.k, given.v, **{"g": given.g, **change})


@pytest.mark.gpu
@pytest.mark.parametrize("delta", [False, True])
def test_auto_on_a_gpu_equals_the_cpu(delta: bool) -> None:
    given = problem(gate="diagonal", delta=delta, lengths=(100,))
    results = []
    for device in ("cpu", "cuda"):
        q, k, v, g, beta = (
            None if x is None else x.to(device) for x in (given.q, given.k, given.v, given.g, given.beta)
        )
        assert q is not None and k is not None and v is not None
        results.append(linear_attention(q, k, v, g=g, beta=beta, kernel="torch")[0].cpu())
    torch.testing.assert_close(*results, rtol=0, atol=1e-9)
