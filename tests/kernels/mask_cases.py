"""Random masks beside a definition of each in plain Python, pair by pair, for property tests."""

from dataclasses import dataclass
from functools import reduce
from itertools import pairwise

import torch
from hypothesis import strategies as st
from torch import Tensor

from longctx.kernels.mask import Mask, Part, chunked, documents, predicate, prefix_lm, sliding_window


def even_sum(q: Tensor, k: Tensor) -> Tensor:
    return (q + k) % 2 == 0


def near_seven(q: Tensor, k: Tensor) -> Tensor:
    return (k % 7 < 3).expand(q.shape[0], -1)


@dataclass(frozen=True)
class Atom:
    """A mask made by one constructor: its name and what it was given."""

    kind: str
    args: tuple = ()

    def mask(self) -> Mask:
        if self.kind == "window":
            left, right, sinks = self.args
            return sliding_window(left, right, sinks=sinks)
        if self.kind == "part":
            return Mask((Part(*self.args),))
        return {
            "documents": documents,
            "prefix": prefix_lm,
            "prefix_per_document": prefix_lm,
            "chunked": chunked,
            "predicate": predicate,
        }[self.kind](*self.args)

    def bounds(self) -> tuple[int, ...]:
        """Return its document bounds, if it has any."""
        return {"documents": self.args[:1], "prefix_per_document": self.args[1:]}.get(self.kind, ((),))[0]

    def sees(self, q: int, k: int, starts: set[int]) -> bool:
        """Tell whether q sees k when documents begin at `starts`: the definition, in words of the docstrings."""
        document, same = start_of(q, starts), start_of(q, starts) == start_of(k, starts)
        if self.kind == "window":
            left, right, sinks = self.args
            near = (left is None or k >= q - left) and (right is None or k <= q + right)
            sink = k - start_of(k, starts) < sinks and (k <= q or right != 0)
            return same and (near or sink)
        if self.kind == "part":
            least, most, first = self.args
            inside = (least is None or k - q >= least) and (most is None or k - q <= most)
            return same and inside and (first is None or k - document < first)
        if self.kind == "documents":
            return same
        if self.kind == "prefix":
            return same and (k <= q or k - document < self.args[0])
        if self.kind == "prefix_per_document":
            prefixes, bounds = self.args
            own = max(b for b in bounds[:-1] if b <= k)
            return same and (k <= q or k - own < prefixes[bounds.index(own)])
        if self.kind == "chunked":
            return same and (q - document) // self.args[0] == (k - document) // self.args[0]
        return bool(self.args[0](torch.tensor([[q]]), torch.tensor([[k]])))


def start_of(position: int, starts: set[int]) -> int:
    return max(start for start in starts if start <= position)


def conjunction(atoms: list[Atom]) -> Mask:
    return reduce(lambda a, b: a & b, (atom.mask() for atom in atoms))


def definition(atoms: list[Atom], total: int) -> Tensor:
    """Return which pairs all atoms let through, all of them about the documents of the whole, bool `[total, total]`."""
    starts = {0}.union(*(atom.bounds() for atom in atoms)) - {total}
    rows = [[all(atom.sees(q, k, starts) for atom in atoms) for k in range(total)] for q in range(total)]
    return torch.tensor(rows)


def atoms(total: int, *, predicates: bool = True) -> st.SearchStrategy[Atom]:
    """Return any mask of one constructor, for `total` tokens."""
    distance = st.one_of(st.none(), st.integers(0, total // 2))
    offset = st.one_of(st.none(), st.integers(-total, total))
    bounds = st.sets(st.integers(1, total - 1), max_size=5).map(lambda inner: (0, *sorted(inner), total))
    per_document = bounds.flatmap(
        lambda b: st.tuples(st.tuples(*(st.integers(0, end - start) for start, end in pairwise(b))), st.just(b))
    )
    kinds = [
        st.tuples(distance, distance, st.integers(0, total // 3)).map(lambda args: Atom("window", args)),
        st.tuples(distance, st.just(0), st.integers(0, total // 3)).map(lambda args: Atom("window", args)),
        st.tuples(offset, offset, distance).map(lambda args: Atom("part", args)),
        bounds.map(lambda b: Atom("documents", (b,))),
        st.integers(0, total).map(lambda n: Atom("prefix", (n,))),
        per_document.map(lambda args: Atom("prefix_per_document", args)),
        st.integers(1, total).map(lambda n: Atom("chunked", (n,))),
    ]
    if predicates:
        kinds.append(st.sampled_from([even_sum, near_seven]).map(lambda fn: Atom("predicate", (fn,))))
    return st.one_of(kinds)
