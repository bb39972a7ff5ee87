"""Sums of per-example gradients against the training's own gradients, also where these overflow."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from sonde.hooks.gradients.sum_checks import SumChecks

EXACT = nn.Parameter(torch.zeros(3))
OTHER = nn.Parameter(torch.zeros(3))


def checked(*compared: tuple[nn.Parameter, Tensor, Tensor]) -> SumChecks:
    checks = SumChecks()
    for parameter, gradient, total in compared:
        checks.add(parameter, gradient, total, [], [])
    return checks


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_gradient_that_is_not_finite_fails_no_other_parameter(value: float) -> None:
    overflowed = torch.full((3,), value)
    checks = checked((OTHER, overflowed, overflowed), (EXACT, torch.ones(3), torch.ones(3)))
    assert checks.failed() == {}
    assert checks.describe() == {"parameters": 1, "largest_difference": 0}


def test_gradients_of_which_none_is_finite_are_compared_with_nothing() -> None:
    checks = checked((OTHER, torch.full((3,), math.inf), torch.ones(3)))
    assert checks.failed() == {}
    assert checks.describe() == "no gradient of a parameter was finite"


@pytest.mark.parametrize(
    ("gradient", "total", "reason"),
    [
        ([3.0, 0, 4], [3.0, 0, 3], "the difference has 20 % of the gradient's norm"),
        ([0.0, 0, 0], [0.0, 0, 3], "the gradient is zero, but their sum has norm 3"),
        ([3.0, 0, 4], [3.0, 0, math.nan], "their sum is not finite, but the gradient is"),
    ],
)
def test_a_sum_that_is_off_says_how_far(
    gradient: list[float], total: list[float], reason: str
) -> None:
    checks = checked((OTHER, torch.tensor(gradient), torch.tensor(total)))
    expected = f"the per-example gradients do not add up to the gradient: {reason}"
    assert checks.failed() == {OTHER: expected}
