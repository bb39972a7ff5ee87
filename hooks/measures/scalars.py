"""Scalars: single numbers of the training, such as the loss and the learning rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from sonde.hooks.arguments import check_schedule
from sonde.hooks.record import Recording, Subject
from sonde.hooks.schedule import Schedule
from sonde.log import LogArray

from .base import Measure


class Scalars(Measure):
    """Record the latest values given to `recorder.log`, and the learning rate.

    Values stay on their device until a due step, so logging costs no synchronization. The learning
    rate of the second parameter group is `learning_rate_1`, and so on.

    Args:
        when: When it is due; None takes the recorder's schedule.
    """

    name = "scalars"

    def __init__(self, *, when: Schedule | None = None) -> None:
        check_schedule(when)
        self.when = when

    @property
    def source(self) -> str:
        """Scalars are of the training itself."""
        return "training"

    def check(self, model: nn.Module) -> None:
        """Accept every model."""

    def table(self) -> Sequence[LogArray]:
        """Return nothing: scalars have no examples."""
        return []

    def describe(self) -> dict[str, Any]:
        """Return what the run's description says of the measure."""
        return {}

    def record_bytes(self, subject: Subject) -> int:
        """Estimate the bytes of one record: next to none."""
        return 8 * (1 + len(subject.scalars))

    def record(self, subject: Subject) -> Recording:
        """Collect the values; one that is no single number is missing, by name."""
        values: dict[str, Any] = {}
        groups = [group for optimizer in subject.optimizers for group in optimizer.param_groups]
        for position, group in enumerate(groups):
            if "lr" in group:
                values[f"learning_rate_{position}" if position else "learning_rate"] = group["lr"]
        recording = Recording()
        for name, value in {**values, **subject.scalars}.items():
            try:
                number = np.array(float(value))
            except (TypeError, ValueError, RuntimeError) as error:
                recording.missing[name] = f"it is no single number: {error}"
                continue
            recording.arrays.append(LogArray(name, number, ()))
        return recording


def latest_numbers(scalars: Mapping[str, Any]) -> dict[str, float]:  # Any: what the user logged.
    """Return the scalars that are numbers, for a checkpoint; what is none is left out."""
    numbers = {}
    for name, value in scalars.items():
        try:
            numbers[name] = float(value)
        except (TypeError, ValueError, RuntimeError):
            continue
    return numbers
