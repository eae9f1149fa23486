"""What ranks that share heads tell each other of what their queries selected: bytes, from sizes alone."""

from collections.abc import Iterable

from longctx.mixers.sparse.base import Slots
from longctx.parallel.heads import HeadSplit
from longctx.sparse_function import told_dtype


def selection_bytes(parts: Iterable[Slots], *, tokens: int, total: int, split: HeadSplit) -> int:
    """Return the bytes that `sparse_function.on_team` sends to each other member of a team, for one row.

    Args:
        parts: what is attended to, part by part.
        tokens: of a rank; total: of the sequence.
        split: which heads each member computes.
    """
    if split.team == 1:
        return 0
    told = 0
    for part in parts:
        heads = len(split.kv(0) if part.heads == split.kv_heads else split.q(0))
        told += heads * part.per_query * (3 if part.classes else 2)  # where slots begin and end, and their classes
    return tokens * told * told_dtype(total).itemsize
