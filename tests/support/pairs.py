"""A covering subset of a product: every legal pair of values of any two factors is in some case."""

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, product
from typing import Any

Case = dict[str, Any]


def covering(factors: Mapping[str, Sequence[Any]], *, legal: Callable[[Case], bool] = lambda case: True) -> list[Case]:
    """Return cases, each begun with the first pair that is not covered yet and filled up greedily.

    The same factors give the same cases, in the same order.

    Args:
        legal: tells whether a case, of which some factors may be missing, can be made a legal one.
    """
    names = list(factors)
    missing = {
        (a, x, b, y): None
        for a, b in combinations(names, 2)
        for x, y in product(factors[a], factors[b])
        if legal({a: x, b: y})
    }
    cases: list[Case] = []
    while missing:
        a, x, b, y = next(iter(missing))
        case = {a: x, b: y}
        for name in names:
            if name not in case:
                choices = [value for value in factors[name] if legal({**case, name: value})]
                case[name] = max(choices, key=lambda value: sum(p in missing for p in _with(case, name, value, names)))
        for a, b in combinations(names, 2):
            missing.pop((a, case[a], b, case[b]), None)
        cases.append({name: case[name] for name in names})
    return cases


def _with(case: Case, name: str, value: Any, names: list[str]) -> list[tuple[str, Any, str, Any]]:
    """Return the pairs that a value makes with those chosen so far."""
    place = names.index(name)
    return [
        (name, value, other, case[other]) if place < names.index(other) else (other, case[other], name, value)
        for other in case
    ]
