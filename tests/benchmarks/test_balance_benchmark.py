"""The balance benchmark's counting kernel sees what plans predict."""

import pytest
from balance import count

from longctx.kernels.mask import causal, documents
from longctx.parallel.balance import balance_of, plans_of_all_ranks
from longctx.parallel.layout import Layout
from longctx.parallel.schedules.ring import Ring


@pytest.mark.parametrize("layout", [Layout("contiguous", 2), Layout("zigzag", 3), Layout("striped", 4)])
def test_what_is_counted_is_what_was_planned(layout: Layout) -> None:
    bounds = (0, 1, 20, 21, 48)
    plans = plans_of_all_ranks(layout, [causal() & documents(bounds)], Ring(), total=48)
    counted = count(plans, bounds)
    assert counted == balance_of(plans)
    assert sum(map(sum, counted.pairs)) == sum(n * (n + 1) // 2 for n in (1, 19, 1, 27))
