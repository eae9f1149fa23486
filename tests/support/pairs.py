"""A covering subset of a product: every legal pair of values of any two factors is in some case."""

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, product
from typing import Any

Case = dict[str, Any]


def covering(factors: Mapping[str, Sequence[Any]], *, legal: Callable[[Case], bool] = lambda case: True) -> list[Case]:
    """Return cases, greedily: each next one holds as many uncovered pairs as any of the legal product.

    The same factors give the same cases, in the same order.
    """
    names = list(factors)
    cases = [case for values in product(*factors.values()) if legal(case := dict(zip(names, values, strict=True)))]
    pairs = {id(case): {(a, case[a], b, case[b]) for a, b in combinations(names, 2)} for case in cases}
    missing = set().union(*pairs.values())
    chosen: list[Case] = []
    # Gains only shrink, so a case whose gain was found earlier cannot be better than it was then.
    queue = sorted(((len(pairs[id(case)]), -index) for index, case in enumerate(cases)), reverse=True)
    while missing:
        best, best_gain, kept = 0, -1, []
        for position, (bound, index) in enumerate(queue):
            if bound <= best_gain:
                kept += queue[position:]
                break
            gain = len(pairs[id(cases[-index])] & missing)
            if gain > best_gain:
                best, best_gain = index, gain
            if gain:
                kept.append((gain, index))
        chosen.append(cases[-best])
        missing -= pairs[id(cases[-best])]
        queue = sorted(kept, reverse=True)
    return chosen
