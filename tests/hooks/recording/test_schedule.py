from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import sonde
from sonde.exceptions import InvalidInputError
from sonde.hooks import Schedule


def due(schedule: Schedule, stop: int = 120) -> list[int]:
    return [step for step in range(stop) if schedule.is_due(step, None)]


def test_every_starts_at_zero() -> None:
    assert due(sonde.every(40)) == [0, 40, 80]


def test_at_is_due_exactly_there() -> None:
    assert due(sonde.at(7, 3)) == [3, 7]


def test_log_spaced_has_zero_one_equal_ratios_and_stop() -> None:
    assert due(sonde.log_spaced(100, per_decade=2)) == [0, 1, 3, 10, 32, 100]


def test_log_spaced_without_stop_goes_on() -> None:
    assert [s for s in (10**5, 10**6) if not sonde.log_spaced().is_due(s, None)] == []


@given(st.floats(0.5, 40), st.integers(0, 200))
def test_log_spaced_has_every_rounded_power(per_decade: float, exponent: int) -> None:
    step = round(10 ** (min(exponent / per_decade, 9)))
    if exponent / per_decade <= 9:
        assert sonde.log_spaced(per_decade=per_decade).is_due(step, None)


@given(st.integers(1, 10**6), st.floats(0.5, 20))
def test_log_spaced_is_always_due_at_its_stop_and_never_later(stop: int, density: float) -> None:
    schedule = sonde.log_spaced(stop, per_decade=density)
    assert schedule.is_due(stop, None)
    assert not any(schedule.is_due(stop + more, None) for more in range(1, 50))


def test_epochs_are_due_where_an_epoch_ends() -> None:
    schedule = sonde.epochs(2)
    assert [schedule.is_due(7, epoch) for epoch in (None, 1, 2, 3, 4)] == [
        False,
        False,
        True,
        False,
        True,
    ]


def test_or_is_due_when_either_is() -> None:
    assert due(sonde.every(50) | sonde.at(3)) == [0, 3, 50, 100]


def test_or_needs_epochs_when_either_does() -> None:
    assert (sonde.at(1) | sonde.epochs(1)).needs_epochs


def test_repr_can_be_read_back() -> None:
    schedule = sonde.every(5) | sonde.log_spaced(100, per_decade=3)
    assert repr(schedule) == "every(5) | log_spaced(100, per_decade=3)"


@pytest.mark.parametrize("value", [0, -1, 2.5, True])
def test_every_refuses_what_is_no_distance(value: Any) -> None:
    with pytest.raises(InvalidInputError, match=r"`every` \(=.*\) must be a whole number >= 1"):
        sonde.every(value)


def test_at_refuses_negative_steps() -> None:
    with pytest.raises(InvalidInputError, match="steps are whole numbers >= 0"):
        sonde.at(3, -1)


def test_log_spaced_refuses_zero_density() -> None:
    with pytest.raises(InvalidInputError, match=r"`per_decade` \(=0\) must be a number > 0"):
        sonde.log_spaced(per_decade=0)
