"""Leak probes of sparse layers: change one token's x, and nothing before it or in other documents may move; ask for
one output's gradient, and no later token's x and none of another document may have one.

What is selected depends on all that went into a router, so that who may move is known from above only; of static
patterns it is known exactly.
"""

from dataclasses import replace

import torch
from torch import Tensor

from longctx.verification import truth_sparse
from longctx.verification.bench import Bench
from longctx.verification.check_data import where
from longctx.verification.check_leaks import probed
from longctx.verification.report import Finding
from longctx.verification.small import Small
from longctx.verification.sparse_layer import document_starts, make_layer, run_layer, settings_of, sparse_kernel

_PROBES = 48
# Which queries are computed together depends on what is selected, and so does the order of sums.
ROUNDING = 1e-11


def check_sparse_leaks(small: Small, bench: Bench, kind: str) -> list[Finding]:
    """Probe token by token in float64, with changes that make others of the selection."""
    settings = settings_of(small, kind)
    kernel = sparse_kernel(small, kind, device=bench.device, dtype=torch.float64, head_dim=small.model.head_size)
    tokens = probed(small, _PROBES)
    rows = torch.arange(len(tokens))
    one = make_layer(small, kind, batch=1, seed=23)
    x = one.inputs["x"].repeat(len(tokens), 1, 1)
    dout = torch.zeros(len(tokens), *one.dout.shape[1:], dtype=torch.float64)
    dout[rows, tokens] = one.dout[0, tokens]
    problem = replace(one, inputs={"x": x}, dout=dout)
    before = run_layer(small, bench, kind, problem).tensors
    changed = x.clone()
    generator = torch.Generator().manual_seed(24)
    noise = torch.randn(len(tokens), x.shape[2], generator=generator, dtype=torch.float64)
    far = (rows % 2 == 1)[:, None]  # turned round, or in the same direction and so far that it is preferred
    changed[rows, tokens] = torch.where(far, 4 * x[rows, tokens], noise - 2 * x[rows, tokens])
    after = run_layer(small, bench, kind, replace(problem, inputs={"x": changed}), backward=False).tensors
    documents = document_starts(small, small.documents[0])
    most, least = truth_sparse.reach(
        settings, documents, heads=small.model.num_heads, kv_heads=small.model.num_kv_heads
    )
    forward = _finding(
        small,
        kind,
        "probes forward",
        _moved(after["out"] - before["out"], before["out"]),
        (most[:, tokens].T, least[:, tokens].T),
        tokens,
        ("changing the token at {token} {does}move the output at {place}", truth_sparse.causal(settings)),
        kernel,
    )
    backward = _finding(
        small,
        kind,
        "probes backward",
        _moved(before["dx"], before["dx"]),
        (most[tokens], least[tokens]),
        tokens,
        ("the gradient of the output at {token} {does}reach the token at {place}", truth_sparse.causal(settings)),
        kernel,
    )
    return [forward, backward]


def _moved(difference: Tensor, like: Tensor) -> Tensor:
    """Return which positions differ by more than rounding: bool `[row, position]`."""
    size = difference.abs().amax(dim=-1)
    return ~(size <= ROUNDING * like.abs().max())


def _finding(
    small: Small,
    kind: str,
    name: str,
    got: Tensor,
    bounds: tuple[Tensor, Tensor],
    tokens: Tensor,
    words: tuple[str, bool],
    kernel: str,
) -> Finding:
    """Compare what moved with what may and what must: bool `[row, position]`, a probed token to each row."""
    most, least = bounds
    sentence, causal = words
    leaks, blind = got & ~most, least & ~got
    why = ""
    if leaks.any() or blind.any():
        row, place = (leaks if leaks.any() else blind).nonzero()[0].tolist()
        does = "did " if leaks.any() else "did not "
        told = sentence.format(token=where(small, int(tokens[row])), place=where(small, place), does=does)
        why = f"{told}, which it must {'not ' if leaks.any() else ''}see" if "gradient" in told else told
    return Finding(
        name=f"{kind}: {name}",
        measured=f"{int(leaks.sum()):,} leaks, {int(blind.sum()):,} blind",
        bound=f"0 of {len(tokens)} tokens" if causal else "0; documents only",
        passed=not why,
        kernel=kernel,
        why=why,
    )
