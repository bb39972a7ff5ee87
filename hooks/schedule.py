"""Schedules: at which steps a measure is due. Every schedule but `at` includes step 0."""

from __future__ import annotations

import math
import numbers
from abc import ABC, abstractmethod
from dataclasses import dataclass

from sonde.exceptions import InvalidInputError


class Schedule(ABC):
    """Says when a measure is due; schedules combine with `|`."""

    @abstractmethod
    def is_due(self, step: int, epoch: int | None) -> bool:
        """Tell whether a measure is due.

        Args:
            step: Completed optimizer steps.
            epoch: Completed epochs, where an epoch has just ended; otherwise None.
        """

    def __or__(self, other: Schedule) -> Schedule:
        """Return a schedule that is due when either is."""
        if not isinstance(other, Schedule):
            return NotImplemented
        return _Either(self, other)

    @property
    def needs_epochs(self) -> bool:
        """Whether it can only be due where an epoch ends."""
        return False


@dataclass(frozen=True)
class _Every(Schedule):
    num_steps: int

    def is_due(self, step: int, epoch: int | None) -> bool:
        return step % self.num_steps == 0

    def __repr__(self) -> str:
        return f"every({self.num_steps})"


@dataclass(frozen=True)
class _At(Schedule):
    steps: frozenset[int]

    def is_due(self, step: int, epoch: int | None) -> bool:
        return step in self.steps

    def __repr__(self) -> str:
        return f"at({', '.join(map(str, sorted(self.steps)))})"


@dataclass(frozen=True)
class _LogSpaced(Schedule):
    stop: int | None
    per_decade: float

    def is_due(self, step: int, epoch: int | None) -> bool:
        if step == 0 or step == self.stop:
            return True
        if self.stop is not None and step > self.stop:
            return False
        nearest = round(self.per_decade * math.log10(step))
        # Rounding 10^(k/n) to a step can move it past the k that is nearest to that step.
        near = range(nearest - 1, nearest + 2)
        return any(round(10 ** (k / self.per_decade)) == step for k in near)

    def __repr__(self) -> str:
        stop = "" if self.stop is None else f"{self.stop}, "
        return f"log_spaced({stop}per_decade={self.per_decade:g})"


@dataclass(frozen=True)
class _Epochs(Schedule):
    num_epochs: int

    def is_due(self, step: int, epoch: int | None) -> bool:
        return step == 0 or (epoch is not None and epoch % self.num_epochs == 0)

    @property
    def needs_epochs(self) -> bool:
        return True

    def __repr__(self) -> str:
        return f"epochs({self.num_epochs})"


@dataclass(frozen=True)
class _Either(Schedule):
    first: Schedule
    second: Schedule

    def is_due(self, step: int, epoch: int | None) -> bool:
        return self.first.is_due(step, epoch) or self.second.is_due(step, epoch)

    @property
    def needs_epochs(self) -> bool:
        return self.first.needs_epochs or self.second.needs_epochs

    def __repr__(self) -> str:
        return f"{self.first} | {self.second}"


def every(num_steps: int) -> Schedule:
    """Be due at steps 0, n, 2n, ….

    Args:
        num_steps: The distance n between due steps.

    Raises:
        InvalidInputError: If it is below 1.
    """
    _check_positive("every", num_steps)
    return _Every(num_steps)


def at(*steps: int) -> Schedule:
    """Be due at exactly these steps.

    Args:
        steps: The steps, counted from 0 (before the first optimizer step).

    Raises:
        InvalidInputError: If there is none, or one is negative.
    """
    if len(steps) == 1 and not isinstance(steps[0], numbers.Number | str) and steps[0] is not None:
        raise InvalidInputError("`at` takes steps one by one: write at(*steps) for a list of steps")
    are_whole = all(isinstance(step, numbers.Integral) for step in steps)
    if not steps or not are_whole or min(steps) < 0:
        raise InvalidInputError(
            f"`at` {steps} needs at least one step; steps are whole numbers >= 0, as in at(0, 100)"
        )
    return _At(frozenset(steps))


def log_spaced(stop: int | None = None, *, per_decade: float = 8) -> Schedule:
    """Be due at steps 0, 1 and on at equal ratios: often early on, rarely later.

    Args:
        stop: The last due step, always included; None goes on for ever.
        per_decade: How many due steps there are from 100 to 1000, from 1000 to 10 000, and so on.
            Below that some coincide, as steps are whole numbers.

    Raises:
        InvalidInputError: If an argument is out of range.

    Example:
        >>> schedule = log_spaced(100, per_decade=3)
        >>> [step for step in range(200) if schedule.is_due(step, None)]
        [0, 1, 2, 5, 10, 22, 46, 100]
    """
    if stop is not None:
        _check_positive("log_spaced", stop)
    if not isinstance(per_decade, numbers.Real) or not per_decade > 0:
        raise InvalidInputError(f"`per_decade` (={per_decade!r}) must be a number > 0")
    return _LogSpaced(stop, per_decade)


def epochs(num_epochs: int = 1) -> Schedule:
    """Be due at step 0 and after every n-th epoch.

    The recorder learns of epochs from `steps_per_epoch`, or from `recorder.epoch()` at the end of
    each.

    Args:
        num_epochs: The distance n in epochs.

    Raises:
        InvalidInputError: If it is below 1.
    """
    _check_positive("epochs", num_epochs)
    return _Epochs(num_epochs)


def _check_positive(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise InvalidInputError(f"`{name}` (={value!r}) must be a whole number >= 1")
