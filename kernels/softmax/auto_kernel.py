"""On a GPU: a library's flash attention where a hop is one plain rectangle, Triton's kernels for every other one."""

from torch import Tensor

from longctx.kernels.contract import LocalKernel, Request, Scores, WorkList
from longctx.kernels.merge import Partial
from longctx.kernels.positions import Tile
from longctx.kernels.softmax.rectangles import rectangles


class AutoKernel:
    """Choose call by call; its methods are those of `contract.LocalKernel`.

    Args:
        plain: for work of which every part is one full or one square causal rectangle.
        general: for all other work.
    """

    def __init__(self, plain: LocalKernel, general: LocalKernel) -> None:
        self.plain, self.general = plain, general
        self.name = f"{general.name}, and {plain.name} for plain hops"

    def unsupported(self, request: Request) -> str | None:
        return self.plain.unsupported(request) or self.general.unsupported(request)

    def chosen(self, work: WorkList) -> LocalKernel:
        """Return the kernel for some work."""
        return self.plain if all(_is_plain(part.tiles) for part in work.parts) else self.general

    def serving(self, work: WorkList) -> str:
        return self.chosen(work).serving(work)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, work: WorkList, scores: Scores, partial: Partial) -> None:
        self.chosen(work).forward(q, k, v, work=work, scores=scores, partial=partial)

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
        rows = {"dout": dout, "delta": delta, "lse": lse}
        self.chosen(work).backward(q, k, v, work=work, scores=scores, **rows, dq=dq, dk=dk, dv=dv)


def _is_plain(tiles: tuple[Tile, ...]) -> bool:
    if len(tiles) != 1:
        return False
    found = rectangles(tiles[0], square_causal=True)
    return len(found) == 1 and found[0].kind != "band"
