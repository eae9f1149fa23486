"""Sum and merge what each query's pairs gave, pair by pair in one order: the same bits on every run and device.

Results lie by the pairs' numbers, those of a query one after the other. Queries have different numbers of pairs, a few
of them maybe thousands: with the queries sorted by that, turn n concerns the first so many, and nothing is padded.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from longctx.kernels.block_sparse.pairs import Pairs


def take(x: Tensor, rows: Tensor) -> Tensor:
    """Return `x[rows]`: on a CPU copied row by row, which indexing is several times slower than."""
    return x.index_select(0, rows)


class Turns:
    """The queries of some pairs, sorted by how many pairs they have.

    Attributes:
        rows: int64 `[N]`, the queries in this order, as `Pairs.rows` tells them.
    """

    def __init__(self, pairs: Pairs) -> None:
        counts, order = torch.sort(pairs.begin.diff(), descending=True, stable=True)
        self.rows = pairs.rows[order]
        self._begin = pairs.begin[order]
        turns = torch.arange(int(counts[0]) if len(counts) else 0, device=counts.device)
        self._alive = torch.searchsorted(-counts, -turns).tolist()  # those with more pairs than turns before

    def merged(self, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        """Merge pairs' out `[P, ..., Dv]` by their lse `[P, ...]`: those of each query, `[N, ..., Dv]` and `[N, ...]`.

        Queries without pairs get 0 and -inf.
        """
        total = lse.new_full((len(self.rows), *lse.shape[1:]), float("-inf"))
        for alive, numbers in self._each():
            torch.logaddexp(total[:alive], take(lse, numbers), out=total[:alive])
        base = total.masked_fill(torch.isneginf(total), 0.0)
        result = out.new_zeros(len(self.rows), *out.shape[1:])
        for alive, numbers in self._each():
            share = (take(lse, numbers) - base[:alive]).exp_()
            result[:alive].addcmul_(share[..., None], take(out, numbers))
        return result, total

    def summed(self, x: Tensor) -> Tensor:
        """Return the sums over each query's pairs: `[P, ...]` -> `[N, ...]`."""
        result = x.new_zeros(len(self.rows), *x.shape[1:])
        for alive, numbers in self._each():
            result[:alive] += take(x, numbers)
        return result

    def _each(self) -> Iterator[tuple[int, Tensor]]:
        """Yield for each turn how many queries have it, and the numbers of their pairs."""
        for turn, alive in enumerate(self._alive):
            yield alive, self._begin[:alive] + turn
