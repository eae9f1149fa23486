"""What the CPU benchmark of linear attention compares, counts and calls wrong."""

import argparse
from typing import Any

import pytest
import torch
from _linear_passes import KINDS, LinearPass, alone, make_inputs
from _linear_report import crossover, wrong
from linear_cpu import compare, measure_bytes

from longctx.parallel.state_passing import PASSINGS


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_are_told_apart(kind: str) -> None:
    """Chunks and recurrence agree on the inputs of a kind, and not on those of one that is off by a token."""
    inputs = make_inputs(kind, 70, 2, 8)
    ours, theirs = (LinearPass(alone(kernel), inputs) for kernel in ("torch", "reference"))
    for each in (ours, theirs):
        each.forward()
        each.backward()
    assert len(ours.grads) == 3 + (kind not in ("linear", "lightning", "deltanet")) + (
        kind in ("deltanet", "gdn", "kda")
    )
    compare(kind, ours, theirs)
    theirs.out = theirs.out.roll(1, dims=1)
    with pytest.raises(RuntimeError, match="not timed"):
        compare(kind, ours, theirs)


def count(rank: int, world_size: int, group: torch.distributed.ProcessGroup) -> list[dict[str, Any]]:
    """Count on a pooled rank."""
    return measure_bytes(argparse.Namespace(heads=2, head_dim=4, shared=[1, 2]))


def test_bytes_are_those_of_the_formula_at_every_length(gloo_pool) -> None:  # type: ignore[no-untyped-def]
    rows = gloo_pool.run(count, 4)[0]
    assert {row["passing"] for row in rows} == set(PASSINGS)
    assert wrong({"bytes": rows}) == []
    state, transition = 4 * 2 * 4 * 4, {"lightning": 4 * 2, "gla": 4 * 2 * 4, "gdn": 4 * 2 * 4 * 4}
    for row in rows:
        if row["passing"] == "all_gather":  # the first link's state, and the others' maps, to all that come later
            forward = [sent for sent, _ in row["sent"]]
            other = state + transition[row["kind"]]
            assert forward == [3 * state, 2 * other, other, 0]
    rows[3]["sent"] = [[1, 0], *rows[3]["sent"][1:]]
    assert wrong({"bytes": rows})


def test_what_is_too_slow_is_told() -> None:
    def report(**changed: Any) -> list[str]:
        ranks = {"tokens": 65536, "passing": "ring", "ranks": 2, "one_s": 1.8, "ranks_s": 1.0}
        kinds = {"kind": "gla", "heads": 1, "tokens": 16384, "chunks_s": 1.0, "recurrent_s": 20.5, "fla_s": 1.1}
        lengths = [{"tokens": tokens, "lightning_s": tokens / 1e5} for tokens in (256, 8192, 16384)]
        lengths[0]["lightning_s"] = 1.0  # too short to be asked
        for key, value in changed.items():
            for row in (ranks, kinds, lengths[2]):
                row.update({key: value} if key in row else {})
        return wrong(
            {"lengths": lengths, "ranks": [ranks], "kinds": [kinds], "ranks_share_cores": changed.get("share", False)}
        )

    assert report() == []
    assert report(lightning_s=0.2) and report(ranks_s=1.1) and report(recurrent_s=19.5) and report(fla_s=0.9)
    assert report(ranks_s=1.1, share=True) == []


def test_the_crossover_lies_between_two_lengths() -> None:
    rows = [
        {"tokens": 512, "softmax_s": 0.5, "lightning_s": 1.0},
        {"tokens": 2048, "softmax_s": 4.0, "lightning_s": 2.0},
    ]
    assert crossover(rows) == pytest.approx(1024)
    assert crossover(rows[:1]) is None
