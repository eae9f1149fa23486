"""A sparse mixer's place that notes what is asked of it: what was selected, what was sent, and to whom."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from longctx.kernels.block_sparse.blocks import Blocks
from longctx.kernels.block_sparse.selection import Selection
from longctx.mixers.sparse_place import SparsePlace
from longctx.parallel.transport import Transport
from longctx.verification.attend import mark

Size = tuple[tuple[int, ...], torch.dtype]


@dataclass(frozen=True, kw_only=True)
class Note:
    """One call of a method of a place on one rank.

    Attributes:
        method: its name.
        sizes: shape and dtype of the tensors that it was given; `x` of what was gathered.
        differentiable: whether a gradient goes back through it.
        window: of a window.
        selection: what was attended to, on the CPU; the same object where that is attended to again.
        hops, bytes_to: what the call sent.
    """

    method: str
    sizes: dict[str, Size]
    differentiable: bool
    window: int
    selection: Selection | None
    hops: int
    bytes_to: dict[int, int]

    @property
    def sent(self) -> int:
        """Return the bytes to all peers."""
        return sum(self.bytes_to.values())


class Watched:
    """A place with notes of the calls so far; see `mixers.sparse_place.SparsePlace`."""

    def __init__(
        self, place: SparsePlace, *, transport: Transport | None = None, given: Sequence[Selection] | None = None
    ) -> None:
        """Watch a place.

        Args:
            transport: what the place sends through, to note what that is.
            given: selections to attend to in place of those that the mixer makes, call by call; None = the mixer's.
        """
        self.notes: list[Note] = []
        self._copies: dict[Selection, Selection] = {}
        self._place, self._transport = place, transport
        self._given = None if given is None else iter(given)

    @property
    def positions(self) -> Tensor:
        return self._place.positions

    @property
    def total(self) -> int:
        return self._place.total

    @property
    def document_of(self) -> Tensor:
        return self._place.document_of

    @property
    def first(self) -> Tensor:
        return self._place.first

    @property
    def softcap(self) -> float | None:
        return self._place.softcap

    def own_blocks(self, block_size: int) -> Blocks:
        return self._place.own_blocks(block_size)

    def all_blocks(self, block_size: int) -> Blocks:
        return self._place.all_blocks(block_size)

    @property
    def trains(self) -> bool:
        return self._place.trains

    def add_loss(self, loss: Tensor) -> None:
        self._place.add_loss(loss)

    def gather_blocks(self, x: Tensor, *, block_size: int) -> Tensor:
        return self._noted(
            "gather_blocks",
            {"x": x},
            lambda: self._place.gather_blocks(x, block_size=block_size),
            differentiable=x.requires_grad,
        )

    def gather_tokens(self, x: Tensor) -> Tensor:
        return self._noted("gather_tokens", {"x": x}, lambda: self._place.gather_tokens(x), differentiable=False)

    def gather_keys(self, k: Tensor) -> Tensor:
        return self._noted("gather_keys", {"x": k}, lambda: self._place.gather_keys(k), differentiable=False)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        selection: Selection,
        gates: Tensor | None = None,
        sink_logits: Tensor | None = None,
    ) -> Tensor:
        tensors = {"q": q, "k": k, "v": v} | ({} if gates is None else {"gates": gates})
        chosen = self._chosen(selection)
        return self._noted(
            "attend",
            tensors,
            lambda: self._place.attend(q, k, v, selection=chosen, gates=gates, sink_logits=sink_logits),
            selection=chosen,
        )

    def attend_sum(self, q: Tensor, k: Tensor, v: Tensor, *, selection: Selection) -> Tensor:
        chosen = self._chosen(selection)
        return self._noted(
            "attend_sum",
            {"q": q, "k": k, "v": v},
            lambda: self._place.attend_sum(q, k, v, selection=chosen),
            selection=chosen,
        )

    def attend_window(self, q: Tensor, k: Tensor, v: Tensor, *, window: int) -> Tensor:
        return self._noted(
            "attend_window",
            {"q": q, "k": k, "v": v},
            lambda: self._place.attend_window(q, k, v, window=window),
            window=window,
        )

    def attend_dense(self, q: Tensor, k: Tensor, v: Tensor, *, sink_logits: Tensor | None) -> Tensor:
        return self._noted(
            "attend_dense",
            {"q": q, "k": k, "v": v},
            lambda: self._place.attend_dense(q, k, v, sink_logits=sink_logits),
        )

    def attend_local(self, q: Tensor, k: Tensor, v: Tensor, *, seen: Tensor) -> Tensor:
        return self._noted(
            "attend_local", {"q": q, "k": k, "v": v}, lambda: self._place.attend_local(q, k, v, seen=seen)
        )

    def recur(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self._noted("recur", {"q": q, "k": k, "v": v}, lambda: self._place.recur(q, k, v))

    def _chosen(self, made: Selection) -> Selection:
        return made if self._given is None else next(self._given)

    def _noted(
        self,
        method: str,
        tensors: dict[str, Tensor],
        call: Callable[[], Tensor],
        *,
        differentiable: bool = True,
        window: int = 0,
        selection: Selection | None = None,
    ) -> Tensor:
        before = None if self._transport is None else mark(self._transport)
        result = call()
        hops, bytes_to = 0, dict[int, int]()
        if self._transport is not None and before is not None:
            after = mark(self._transport)
            hops = after.hops - before.hops
            sent = {peer: count - before.bytes_to.get(peer, 0) for peer, count in after.bytes_to.items()}
            bytes_to = {peer: count for peer, count in sent.items() if count}
        note = Note(
            method=method,
            sizes={name: (tuple(x.shape), x.dtype) for name, x in tensors.items()},
            differentiable=differentiable,
            window=window,
            selection=None if selection is None else self._copies.setdefault(selection, _on_cpu(selection)),
            hops=hops,
            bytes_to=bytes_to,
        )
        self.notes.append(note)
        return result


def selections(notes: Sequence[Note]) -> list[Selection]:
    """Return what was attended to, call by call."""
    return [note.selection for note in notes if note.selection is not None]


def _on_cpu(selection: Selection) -> Selection:
    def moved(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.detach().cpu().clone()

    lo, hi = moved(selection.lo), moved(selection.hi)
    assert lo is not None and hi is not None
    beside = None if selection.beside is None else _on_cpu(selection.beside)
    return replace(
        selection,
        lo=lo,
        hi=hi,
        slot_class=moved(selection.slot_class),
        key_class=moved(selection.key_class),
        beside=beside,
    )
