"""The error budget: it accepts what torch itself does, and refuses anything clearly worse."""

import pytest
import torch

from tests.support.tolerance import GRADIENT_FACTOR, assert_within_budget, max_error

REF = torch.tensor([1.0, 2.0, 3.0])
TORCH = REF + torch.tensor([0.0, 0.01, 0.0])


@pytest.mark.parametrize("error", [0.0, 0.015, -0.019])
def test_accepts_up_to_twice_the_error_of_torch(error):
    assert_within_budget(REF + torch.tensor([error, 0.0, 0.0]), TORCH, REF)


def test_refuses_more_than_twice_the_error_of_torch():
    with pytest.raises(AssertionError, match=r"dq: max error 2\.500e-02 is over the budget 2\.000e-02 = 2 x"):
        assert_within_budget(REF + 0.025, TORCH, REF, name="dq")


def test_gradients_get_three_times():
    assert_within_budget(REF + 0.025, TORCH, REF, factor=GRADIENT_FACTOR)
    with pytest.raises(AssertionError, match="3 x"):
        assert_within_budget(REF + 0.035, TORCH, REF, factor=GRADIENT_FACTOR)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_refuses_numbers_that_are_none(bad):
    ours = TORCH.clone()
    ours[1] = bad
    with pytest.raises(AssertionError, match="max error"):
        assert_within_budget(ours, TORCH, REF)
    with pytest.raises(AssertionError, match="no basis"):
        assert_within_budget(TORCH, ours, REF)


def test_equal_infinities_are_no_error():
    lse = torch.tensor([0.5, -torch.inf])
    assert max_error(lse, lse) == 0.0
    assert_within_budget(lse, lse, lse)


def test_exact_torch_means_exact_ours():
    assert_within_budget(REF, REF, REF)
    with pytest.raises(AssertionError, match="over the budget 0"):
        assert_within_budget(REF + 1e-6, REF, REF)


def test_refuses_a_low_precision_reference_and_other_shapes():
    with pytest.raises(AssertionError, match="float32 or float64"):
        assert_within_budget(REF.bfloat16(), REF.bfloat16(), REF.bfloat16())
    with pytest.raises(AssertionError, match="shapes differ"):
        assert_within_budget(REF[:1], REF, REF)


def test_compares_low_precision_in_float64():
    ref = torch.linspace(1, 2, 100, dtype=torch.float64)
    assert_within_budget(ref.bfloat16(), ref.bfloat16(), ref, factor=1.0)
