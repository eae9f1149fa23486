"""Static patterns against predicates on two tokens, written as the papers say them."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from longctx.kernels.block_sparse.patterns.fixed import Fixed
from longctx.kernels.block_sparse.patterns.neighborhood import Neighborhood
from longctx.kernels.block_sparse.patterns.pattern import Pattern
from longctx.kernels.block_sparse.patterns.s2 import S2
from longctx.kernels.block_sparse.patterns.strided import Strided
from longctx.kernels.block_sparse.patterns.vertical_slash import VerticalSlash
from longctx.kernels.block_sparse.selection import Selection, allowed

HEADS, KV_HEADS = 4, 2
ROWS = ((1, 30, 1, 7, 24), (63,))  # lengths of the documents of two rows
TOTAL = 63

Sees = Callable[[int, int, int], bool]  # (i, j, KV head) of one document, j <= i


def strided(stride: int) -> Sees:
    return lambda i, j, g: i - j < stride or (i - j) % stride == 0


def strided_alternate(stride: int) -> Sees:
    return lambda i, j, g: i - j < stride if g % 2 == 0 else (i - j) % stride == 0


def fixed(stride: int, columns: int) -> Sees:
    return lambda i, j, g: j // stride == i // stride or j % stride in range(stride - columns, stride)


def fixed_alternate(stride: int, columns: int) -> Sees:
    return lambda i, j, g: j // stride == i // stride if g % 2 == 0 else j % stride in range(stride - columns, stride)


def neighborhood(window: int, stride: int = 1, dilation: int = 1) -> Sees:
    def sees(i: int, j: int, g: int) -> bool:
        if i % dilation != j % dilation:
            return False
        a, b = i // dilation, j // dilation
        group = a // stride
        leader = max(x for x in range(a + stride) if x // stride == group)
        return leader - window < b

    return sees


def s2(block_size: int, local: int, stride: int) -> Sees:
    step = max(1, stride // KV_HEADS)

    def sees(i: int, j: int, g: int) -> bool:
        query, key = i // block_size, j // block_size
        return query - key < local or (key + 1 + g * step) % stride == 0

    return sees


def vertical_slash(vertical, slash, window: int) -> Sees:
    def of(some, g: int):
        return some[g] if some and isinstance(some[0], tuple) else some

    return lambda i, j, g: i - j < window or j in of(vertical, g) or i - j in of(slash, g)


PER_HEAD = (((0, 3, 4), (9,)), ((6, 7, 20), ()))
CASES: dict[str, tuple[Pattern, Sees]] = {
    "strided-few-columns": (Strided(stride=9), strided(9)),
    "strided-many-columns": (Strided(stride=4), strided(4)),
    "strided-longer-than-documents": (Strided(stride=100), strided(100)),
    "strided-1": (Strided(stride=1), strided(1)),
    "strided-alternate": (Strided(stride=5, heads="alternate"), strided_alternate(5)),
    "fixed": (Fixed(stride=8, columns=3), fixed(8, 3)),
    "fixed-all-columns": (Fixed(stride=5, columns=5), fixed(5, 5)),
    "fixed-alternate": (Fixed(stride=7, columns=2, heads="alternate"), fixed_alternate(7, 2)),
    "sliding-window": (Neighborhood(window=6), neighborhood(6)),
    "strided-window": (Neighborhood(window=10, stride=4), neighborhood(10, 4)),
    "blocked": (Neighborhood(window=7, stride=7), lambda i, j, g: i // 7 == j // 7),
    "dilated": (Neighborhood(window=4, dilation=5), lambda i, j, g: (i - j) % 5 == 0 and (i - j) // 5 < 4),
    "dilated-strided": (Neighborhood(window=5, stride=3, dilation=4), neighborhood(5, 3, 4)),
    "s2": (S2(block_size=4, local=2, stride=2), s2(4, 2, 2)),
    "s2-local-1": (S2(block_size=3, local=1, stride=2), s2(3, 1, 2)),
    "s2-more-shards-than-heads": (S2(block_size=3, local=2, stride=5), s2(3, 2, 5)),
    "vertical-slash": (
        VerticalSlash(vertical=(0, 1, 5, 11, 12, 40), slash=(2, 3, 9, 10, 11, 33), window=3),
        vertical_slash((0, 1, 5, 11, 12, 40), (2, 3, 9, 10, 11, 33), 3),
    ),
    "vertical-slash-per-head": (
        VerticalSlash(vertical=PER_HEAD[0], slash=PER_HEAD[1], window=2),
        vertical_slash(*PER_HEAD, 2),
    ),
    "slash-only": (VerticalSlash(slash=(4, 8), window=1), vertical_slash((), (4, 8), 1)),
    "sinks-and-window": (VerticalSlash(vertical=(0, 1, 2, 3), window=5), lambda i, j, g: j < 4 or i - j < 5),
}
# Those of all heads, or of an even number of them, whose mean `pairs` is.
EXACT = [name for name in CASES if name != "s2-more-shards-than-heads"]
cases = pytest.mark.parametrize("name", CASES)


def documents(lengths: tuple[tuple[int, ...], ...]) -> torch.Tensor:
    """Return `document_of`, int64 `[R, total]`, of the lengths in each row."""
    rows = []
    for some in lengths:
        begins = [sum(some[:n]) for n in range(len(some))]
        rows.append([begin for begin, length in zip(begins, some, strict=True) for _ in range(length)])
    return torch.tensor(rows)


def selection_of(
    pattern: Pattern, lengths=ROWS, *, positions: torch.Tensor | None = None, kv_heads: int = KV_HEADS
) -> Selection:
    document_of = documents(lengths)
    if positions is None:
        positions = torch.arange(document_of.shape[1])
    return pattern.selection(positions=positions, document_of=document_of, num_heads=HEADS, num_kv_heads=kv_heads)


def predicate(sees: Sees, lengths) -> torch.Tensor:
    """Return what each query sees, bool `[R, HK, total, total]`, token by token."""
    total = sum(lengths[0])
    seen = torch.zeros(len(lengths), KV_HEADS, total, total, dtype=torch.bool)
    for row, document_lengths in enumerate(lengths):
        begin = 0
        for length in document_lengths:
            for i in range(length):
                for j in range(i + 1):
                    for g in range(KV_HEADS):
                        seen[row, g, begin + i, begin + j] = sees(i, j, g)
            begin += length
    return seen


@cases
def test_a_selection_is_its_predicate(name):
    pattern, sees = CASES[name]
    assert torch.equal(allowed(selection_of(pattern), torch.arange(TOTAL)), predicate(sees, ROWS))


@cases
def test_some_queries_in_any_order_see_the_same(name):
    """A rank has some of the positions; what they see is what they see where all are."""
    pattern, _ = CASES[name]
    positions = torch.tensor([40, 41, 3, 62, 0, 31])
    whole = allowed(selection_of(pattern), torch.arange(TOTAL))
    assert torch.equal(allowed(selection_of(pattern, positions=positions), torch.arange(TOTAL)), whole[:, :, positions])


@cases
def test_a_document_sees_the_same_packed_and_alone(name):
    pattern, _ = CASES[name]
    packed = allowed(selection_of(pattern), torch.arange(TOTAL))[0]
    begin = 0
    for length in ROWS[0]:
        alone = allowed(selection_of(pattern, ((length,),)), torch.arange(length))[0]
        inside = slice(begin, begin + length)
        assert torch.equal(packed[:, inside, inside], alone)
        assert packed[:, inside].sum() == alone.sum()
        begin += length


@cases
def test_a_token_sees_the_same_whatever_follows(name):
    pattern, _ = CASES[name]
    long = allowed(selection_of(pattern, ((TOTAL,),)), torch.arange(TOTAL))
    for length in (1, 13, 40):
        short = allowed(selection_of(pattern, ((length,),)), torch.arange(length))
        assert torch.equal(short, long[:, :, :length, :length])


@cases
def test_every_token_sees_itself(name):
    seen = allowed(selection_of(CASES[name][0]), torch.arange(TOTAL)).diagonal(dim1=-2, dim2=-1)
    if name == "fixed-alternate":  # columns only, in the second head
        seen = seen[:, :1]
    assert seen.all()


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("length", [1, 2, 13, 40, 63])
def test_pairs_are_counted(name, length):
    pattern, _ = CASES[name]
    count = int(allowed(selection_of(pattern, ((length,),)), torch.arange(length)).sum())
    assert pattern.pairs(0, length) == pattern.pairs(17, length) == (2 * count + KV_HEADS) // (2 * KV_HEADS)


@pytest.mark.parametrize("length", [1, 14, 47])
@pytest.mark.parametrize("local", [1, 3])
def test_pairs_of_s2_are_those_of_all_shards(length, local):
    pattern = S2(block_size=3, local=local, stride=5)
    count = int(allowed(selection_of(pattern, ((length,),), kv_heads=10), torch.arange(length)).sum())
    assert pattern.pairs(0, length) == (2 * count + 10) // 20


def test_pairs_at_a_million_tokens():
    length = 1_000_003
    assert Strided(stride=1).pairs(0, length) == length * (length + 1) // 2
    assert Neighborhood(window=512).pairs(0, length) == 512 * length - 512 * 511 // 2
    assert Fixed(stride=128, columns=128).pairs(0, length) == length * (length + 1) // 2
    assert S2(block_size=64, local=8, stride=1).pairs(0, length) == length * (length + 1) // 2
    assert VerticalSlash(vertical=tuple(range(64)), window=length).pairs(0, length) == length * (length + 1) // 2


@pytest.mark.parametrize("first", range(4))
def test_any_shards_in_a_row_are_all_of_the_past(first):
    """S2: as many KV heads in a row as the stride says see every earlier token between them."""
    pattern = S2(block_size=4, local=2, stride=3)
    seen = allowed(selection_of(pattern, ((TOTAL,),), kv_heads=6), torch.arange(TOTAL))[0, first : first + 3]
    assert torch.equal(seen.any(0), torch.ones(TOTAL, TOTAL, dtype=torch.bool).tril())
    away = seen & ~allowed(selection_of(Neighborhood(window=8)), torch.arange(TOTAL))[1, 0]
    assert (away[:, TOTAL - 1, :52].sum(0) == 1).all()  # and of what is far each sees another part


@pytest.mark.parametrize(("kv_heads", "stride"), [(1, 2), (1, 4), (2, 3), (2, 4)])
def test_query_heads_share_out_what_kv_heads_are_too_few_for(kv_heads, stride):
    """S2: the union over the query heads is all of the past; with more shards than those there are holes."""
    causal = torch.ones(TOTAL, TOTAL, dtype=torch.bool).tril()
    pattern = S2(block_size=4, local=2, stride=stride)
    assert HEADS >= stride > kv_heads
    seen = allowed(selection_of(pattern, ((TOTAL,),), kv_heads=kv_heads), torch.arange(TOTAL))[0]
    assert len(seen) == HEADS
    assert torch.equal(seen.any(0), causal)
    wider = S2(block_size=4, local=2, stride=HEADS + 1)
    seen = allowed(selection_of(wider, ((TOTAL,),), kv_heads=kv_heads), torch.arange(TOTAL))[0]
    assert len(seen) == kv_heads
    assert not torch.equal(seen.any(0), causal)


@cases
def test_heads_that_are_alike_are_not_copied(name):
    selection = selection_of(CASES[name][0])
    assert selection.heads == KV_HEADS
    alike = name not in ("strided-alternate", "fixed-alternate", "vertical-slash-per-head")
    assert (selection.lo.stride(2) == 0) == alike


@cases
def test_patterns_are_values(name):
    pattern, _ = CASES[name]
    assert {pattern: 1}[replace(pattern)] == 1


def test_few_slots_whatever_the_length():
    """Long documents need as many as short ones, and many columns as many as one."""
    for pattern, slots in [
        (Strided(stride=8, heads="alternate"), 1),
        (Fixed(stride=8, columns=2), 2),
        (Neighborhood(window=4, dilation=8), 1),
        (S2(block_size=8, local=2, stride=4), 2),
        (Strided(stride=8), 2),
        (Strided(stride=20), 2),
        (VerticalSlash(vertical=(0, 1, 5, 20, 30, 40), slash=(3, 4, 9, 10), window=3), 3),
    ]:
        assert sum(part.slots for part in selection_of(pattern, ((80,),)).parts()) == slots


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Strided(stride=0), "stride must be >= 1"),
        (lambda: Strided(stride=4, heads="both"), "heads=both is not known; known are merged, alternate"),
        (lambda: Fixed(stride=4, columns=5), "columns must be 1 to stride=4; given 5"),
        (lambda: Fixed(stride=4, columns=0), "columns must be 1 to stride=4; given 0"),
        (lambda: Fixed(stride=4, columns=1, heads="x"), "heads=x is not known"),
        (lambda: Neighborhood(window=4, stride=5), "stride must be 1 to window=4; given 5"),
        (lambda: Neighborhood(window=4, dilation=0), "dilation must be >= 1"),
        (lambda: S2(block_size=4, local=0, stride=2), "local must be >= 1; given 0"),
        (lambda: VerticalSlash(window=0), "window must be >= 1"),
        (lambda: VerticalSlash(vertical=(0, -1), window=1), "vertical must be offsets >= 0; given -1"),
        (lambda: VerticalSlash(slash=((1,), (-2,)), window=1), "slash must be offsets >= 0; given -2"),
    ],
)
def test_impossible_patterns_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize(
    "pattern", [Strided(stride=4, heads="alternate"), Fixed(stride=4, columns=1, heads="alternate")]
)
def test_one_kv_head_cannot_alternate(pattern):
    with pytest.raises(ValueError, match="needs 2 of them or more; given num_kv_heads=1"):
        selection_of(pattern, kv_heads=1)


def test_offsets_for_other_heads_are_refused():
    with pytest.raises(ValueError, match="vertical has offsets for 3 KV heads, there are 2"):
        selection_of(VerticalSlash(vertical=((0,), (1,), (2,)), window=1))
