"""The `torch` and `flash_attn` kernels: tiles through a primitive, rectangle by rectangle, merged in float32.

What the primitives round is told in docs/numerics.md: ATen's round each rectangle's results to the input dtype.
"""

from collections.abc import Sequence

from torch import Tensor

from longctx.kernels.contract import Request, Scores, WorkList
from longctx.kernels.merge import Partial, merge_into
from longctx.kernels.positions import Tile
from longctx.kernels.softmax.by_lists import ByLists
from longctx.kernels.softmax.memory import dense_heads
from longctx.kernels.softmax.primitive import Primitive
from longctx.kernels.softmax.rectangles import Rectangle, rectangles


class TorchKernel(ByLists):
    """Serve tiles by splitting them into rectangles for a primitive."""

    def __init__(self, primitive: Primitive, *, name: str = "torch") -> None:
        self.name = name
        self._primitive = primitive

    def serving(self, work: WorkList) -> str:
        """Return the primitive's name."""
        return self._primitive.name

    def unsupported(self, request: Request) -> str | None:
        if request.predicate:
            return "an arbitrary predicate has no band: only the reference kernel evaluates it densely"
        return self._primitive.unsupported(request)

    def _forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, tiles: Sequence[Tile], scores: Scores, partial: Partial
    ) -> None:
        q, k, v = (dense_heads(x) for x in (q, k, v))
        for shape in self._rectangles(tiles):
            rows, columns = shape.rows, shape.columns
            out, lse = self._primitive.forward(q[:, rows], k[:, columns], v[:, columns], shape=shape, scores=scores)
            merge_into(Partial(partial.out[:, rows], partial.lse[:, :, rows]), out, lse)

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
    ) -> None:
        q, k, v, dout = (dense_heads(x) for x in (q, k, v, dout))
        row_term = self._primitive.row_term(dout, delta)
        for shape in self._rectangles(tiles):
            rows, columns = shape.rows, shape.columns
            dq_part, dk_part, dv_part = self._primitive.backward(
                q[:, rows],
                k[:, columns],
                v[:, columns],
                shape=shape,
                scores=scores,
                dout=dout[:, rows],
                row_term=row_term[:, rows],
                lse=lse[:, :, rows],
            )
            dq[:, rows] += dq_part
            dk[:, columns] += dk_part
            dv[:, columns] += dv_part

    def _rectangles(self, tiles: Sequence[Tile]) -> list[Rectangle]:
        assert all(tile.predicate is None for tile in tiles), "a rectangle has no predicate"  # see `unsupported`
        wanted = {"square_causal": self._primitive.square_causal, "high_bands": self._primitive.high_bands}
        return [shape for tile in tiles for shape in rectangles(tile, **wanted)]
