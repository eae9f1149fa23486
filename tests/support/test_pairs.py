"""The covering subset covers, is small, and holds only what is legal."""

from itertools import combinations, product

from tests.support.pairs import covering

FACTORS = {"a": (1, 2, 3, 4), "b": "xyz", "c": (True, False), "d": range(5)}


def test_every_legal_pair_is_there_and_few_cases_are_needed():
    def legal(case):
        return case.get("a") != 4 or case.get("b") != "z"

    cases = covering(FACTORS, legal=legal)
    for a, b in combinations(FACTORS, 2):
        seen = {(case[a], case[b]) for case in cases}
        assert seen == {pair for pair in product(FACTORS[a], FACTORS[b]) if (a, b) != ("a", "b") or pair != (4, "z")}
    assert len(cases) <= 25 and all(map(legal, cases))
    assert cases == covering(FACTORS, legal=legal)
