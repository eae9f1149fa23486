"""What kernels share that compute one list of tiles at a time: each sees only the rows and heads of its list."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor

from longctx.kernels.contract import Scores, WorkList
from longctx.kernels.merge import Partial
from longctx.kernels.positions import Tile


class ByLists(ABC):
    """`contract.LocalKernel`'s passes from those of one list; with several each is computed by itself."""

    name: str

    def serving(self, work: WorkList) -> str:
        """Return who computes the work."""
        return self.name

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, work: WorkList, scores: Scores, partial: Partial) -> None:
        """Merge the attention of the work's tiles into `partial`."""
        for each in work.parts:
            self._forward(
                q[each.q],
                k[each.kv],
                v[each.kv],
                tiles=each.tiles,
                scores=scores,
                partial=Partial(partial.out[each.q], partial.lse[each.lse]),
            )

    def backward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        work: WorkList,
        scores: Scores,
        dout: Tensor,
        delta: Tensor,
        lse: Tensor,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
    ) -> None:
        """Add the gradients of the work's tiles to `dq, dk, dv`."""
        for each in work.parts:
            self._backward(
                q[each.q],
                k[each.kv],
                v[each.kv],
                tiles=each.tiles,
                scores=scores,
                dout=dout[each.q],
                delta=delta[each.lse],
                lse=lse[each.lse],
                dq=dq[each.q],
                dk=dk[each.kv],
                dv=dv[each.kv],
            )

    @abstractmethod
    def _forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, tiles: Sequence[Tile], scores: Scores, partial: Partial
    ) -> None: ...

    @abstractmethod
    def _backward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        tiles: Sequence[Tile],
        scores: Scores,
        dout: Tensor,
        delta: Tensor,
        lse: Tensor,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
    ) -> None: ...
