"""Say which samples a data-parallel rank takes at a step."""


def grad_accum_steps(*, global_batch: int, micro_batch: int, dp_size: int) -> int:
    """Return how many micro-batches each data-parallel rank runs per step.

    Raises ValueError unless `global_batch` is a positive multiple of `micro_batch * dp_size`.
    """
    for key, value in (("train.global_batch", global_batch), ("train.micro_batch", micro_batch)):
        if value < 1:
            raise ValueError(f"{key}={value} must be at least 1 sample")
    if dp_size < 1:
        raise ValueError(f"the data-parallel size is {dp_size}; it must be at least 1")
    per_round = micro_batch * dp_size
    if global_batch % per_round:
        below, above = global_batch // per_round * per_round, -(-global_batch // per_round) * per_round
        near = f"{above}" if below == 0 else f"{below} or {above}"
        raise ValueError(
            f"train.global_batch={global_batch} is not a multiple of train.micro_batch={micro_batch} x dp size "
            f"{dp_size} = {per_round}; set train.global_batch to {near}, or change train.micro_batch or the dp size"
        )
    return global_batch // per_round


def sample_indices(step: int, *, global_batch: int, micro_batch: int, dp_rank: int, dp_size: int) -> list[list[int]]:
    """Return the global sample indices of one rank at one step: one list of `micro_batch` per accumulation micro-batch.

    Over all dp ranks the lists hold each of `range(step * global_batch, (step + 1) * global_batch)` exactly once. So
    what a step trains on depends on neither dp, cp nor accumulation, and the first index is the position to save in a
    checkpoint.
    """
    if step < 0:
        raise ValueError(f"step={step} must not be negative")
    rounds = grad_accum_steps(global_batch=global_batch, micro_batch=micro_batch, dp_size=dp_size)
    if not 0 <= dp_rank < dp_size:
        raise ValueError(f"dp_rank={dp_rank} is outside [0, {dp_size})")
    first = step * global_batch
    starts = [first + (r * dp_size + dp_rank) * micro_batch for r in range(rounds)]
    return [list(range(start, start + micro_batch)) for start in starts]
