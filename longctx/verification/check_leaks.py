"""Leak probes: change one token, and exactly what may see it moves; ask for one output's gradient, and exactly what it
sees has one.

Many probes are one batch, a token to each row, so that all ranks, hops and tiles run as they do in training.
"""

import dataclasses

import torch
from torch import Tensor

from longctx.parallel.plan import plan
from longctx.verification.attend import attend, kernel_name
from longctx.verification.bench import Bench
from longctx.verification.check_attention import problem_of
from longctx.verification.check_data import where
from longctx.verification.report import Finding
from longctx.verification.small import Small

_CALLS = 5_000  # rows x tiles of all ranks for the kernel that goes through rows one by one
_WORK = 700_000_000  # rows x heads x T x T x head size of one probing pass


def check_leaks(small: Small, bench: Bench, *, dtype: torch.dtype, head_dim: int) -> list[Finding]:
    """Probe token by token, forward and backward, in one dtype."""
    kernel = kernel_name(small, device=bench.device, dtype=dtype, head_dim=head_dim)
    most = max(_WORK // (small.model.num_heads * small.total**2 * head_dim), 8)
    if kernel.endswith("Blocked"):
        most = min(most, max(_CALLS // max(tiles_of_all_ranks(small), 1), 8))
    tokens = probed(small, most)
    rows = torch.arange(len(tokens))
    problem = problem_of(small, batch=len(tokens), head_dim=head_dim, dtype=dtype)
    # Even weights and a large change: in 16 bits, too, whoever sees the token moves.
    problem = dataclasses.replace(problem, q=problem.q / 4)
    dout = torch.zeros_like(problem.dout)
    dout[rows, tokens] = problem.dout[rows, tokens]
    problem = dataclasses.replace(problem, dout=dout)
    before = attend(small, bench, problem, small.masks[:1]).tensors
    k, v = problem.k.clone(), problem.v.clone()
    k[rows, tokens] *= -0.5
    v[rows, tokens] += 512.0
    after = attend(small, bench, dataclasses.replace(problem, k=k, v=v), small.masks[:1], backward=False).tensors
    allowed = small.allowed[0].expand(small.model.num_heads, -1, -1)
    short = str(dtype).removeprefix("torch.")
    moved = (before["out"] != after["out"]).any(dim=-1)  # [row, position, head]
    seen_by = allowed[:, :, tokens].permute(2, 1, 0)
    forward = leak_finding(small, f"leak probes, {short}: forward", moved, seen_by, tokens, kernel, FORWARD)
    # The gradients of KV heads, each read by a group of query heads.
    sees = allowed[:, tokens].unflatten(0, (small.model.num_kv_heads, -1)).any(dim=1).permute(1, 2, 0)
    touched = (before["dv"] != 0).any(dim=-1)
    backward = leak_finding(small, f"leak probes, {short}: backward", touched, sees, tokens, kernel, BACKWARD)
    own = torch.zeros(len(tokens), small.total, dtype=torch.bool)
    own[rows, tokens] = True
    stray = (before["dk"] != 0).any(dim=-1) & ~sees
    stray_q = (before["dq"] != 0).flatten(2).any(dim=-1) & ~own
    if backward.passed and (stray.any() or stray_q.any()):
        name, stray = ("dk", stray.any(dim=-1)) if stray.any() else ("dq", stray_q)
        row, place = stray.nonzero()[0].tolist()
        output = where(small, int(tokens[row]))
        why = f"{name} of {where(small, place)} depends on the output at {output}, and neither sees the other"
        backward = dataclasses.replace(
            backward, measured=f"{int(stray.sum()):,} leaks in {name}", passed=False, why=why
        )
    return [forward, backward]


FORWARD = ("changing the token at {token} moved the output at {place}", "did not move")
BACKWARD = ("the gradient of the output at {token} reached the value at {place}", "did not reach")


def tiles_of_all_ranks(small: Small) -> int:
    """Return the kernel calls of one row of a batch, over all ranks and hops."""
    ranks = range(small.cp)
    return sum(
        plan(small.layout, small.masks[:1], small.schedule, rank=rank, total=small.total).num_tiles for rank in ranks
    )


def probed(small: Small, count: int) -> Tensor:
    """Return the tokens to probe: all of them, or the ends of documents and others spread evenly."""
    if count >= small.total:
        return torch.arange(small.total)
    bounds = small.samples[0].cu_seqlens
    edges = [place for bound in bounds for place in (bound - 1, bound) if 0 <= place < small.total][: count // 2]
    spread = torch.linspace(0, small.total - 1, count - len(set(edges))).long().tolist()
    return torch.tensor(sorted({*edges, *spread}))


def leak_finding(
    small: Small, name: str, got: Tensor, expected: Tensor, tokens: Tensor, kernel: str, words: tuple[str, str]
) -> Finding:
    """Compare what moved with what may: bool `[row, position, head]`, a probed token to each row."""
    leaks, blind = got & ~expected, expected & ~got
    why = ""
    bad = leaks if leaks.any() else blind
    if bad.any():
        row, place, _ = bad.nonzero()[0].tolist()
        told = words[0].format(token=where(small, int(tokens[row])), place=where(small, place))
        if leaks.any():
            why = f"{told}, which must not see it" if words is FORWARD else f"{told}, which it must not see"
        else:
            why = told.replace("moved", words[1], 1).replace("reached", words[1], 1) + ", though the mask lets it"
    return Finding(
        name=name,
        measured=f"{int(leaks.sum()):,} leaks, {int(blind.sum()):,} blind",
        bound=f"0 of {len(tokens)} tokens",
        passed=not leaks.any() and not blind.any(),
        kernel=kernel,
        why=why,
    )
