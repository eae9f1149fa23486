"""Which samples a rank takes: the same set at every layout."""

import pytest

from longctx.data.batches import grad_accum_steps, sample_indices


@pytest.mark.parametrize(("dp_size", "micro_batch"), [(1, 1), (1, 12), (2, 1), (2, 3), (3, 2), (4, 3), (6, 1), (12, 1)])
@pytest.mark.parametrize("step", [0, 1, 7])
def test_ranks_share_a_step_without_gap_or_repeat(step: int, dp_size: int, micro_batch: int) -> None:
    taken = []
    for rank in range(dp_size):
        rounds = sample_indices(step, global_batch=12, micro_batch=micro_batch, dp_rank=rank, dp_size=dp_size)
        assert len(rounds) == grad_accum_steps(global_batch=12, micro_batch=micro_batch, dp_size=dp_size)
        assert all(len(batch) == micro_batch for batch in rounds)
        taken += [i for batch in rounds for i in batch]
    assert sorted(taken) == list(range(12 * step, 12 * step + 12))


def test_literal_order() -> None:
    """Written out, because a change of this order changes what a resumed run sees."""
    got = [sample_indices(1, global_batch=8, micro_batch=2, dp_rank=r, dp_size=2) for r in range(2)]
    assert got == [[[8, 9], [12, 13]], [[10, 11], [14, 15]]]


def test_indices_are_not_bounded() -> None:
    assert sample_indices(2**40, global_batch=4, micro_batch=4, dp_rank=0, dp_size=1) == [[2**42 + i for i in range(4)]]


@pytest.mark.parametrize(
    ("global_batch", "micro_batch", "dp_size", "message"),
    [
        (10, 2, 2, r"train.global_batch=10 .* train.micro_batch=2 x dp size 2 = 4; set train.global_batch to 8 or 12"),
        (1, 1, 2, r"train.global_batch=1 .* = 2; set train.global_batch to 2,"),
        (0, 1, 1, "train.global_batch=0 must be at least 1"),
        (4, 0, 1, "train.micro_batch=0 must be at least 1"),
        (4, 1, 0, "data-parallel size is 0"),
    ],
)
def test_impossible_batches(global_batch: int, micro_batch: int, dp_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample_indices(0, global_batch=global_batch, micro_batch=micro_batch, dp_rank=0, dp_size=dp_size)


def test_rank_and_step_are_checked() -> None:
    with pytest.raises(ValueError, match=r"dp_rank=2 is outside \[0, 2\)"):
        sample_indices(0, global_batch=4, micro_batch=1, dp_rank=2, dp_size=2)
    with pytest.raises(ValueError, match="step=-1"):
        sample_indices(-1, global_batch=4, micro_batch=1, dp_rank=0, dp_size=2)
