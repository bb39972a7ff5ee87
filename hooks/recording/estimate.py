"""An estimate of how many bytes a recording will write, before it has begun."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from sonde.hooks.measures.base import Measure
from sonde.hooks.record import Subject
from sonde.hooks.schedule import Schedule
from sonde.sizes import size_text

from .text_table import TextTable


@dataclass(frozen=True)
class MeasureEstimate:
    """What one measure will write.

    Attributes:
        measure: Its name.
        source: Where its examples come from.
        record_bytes: The bytes of the arrays of one record; None if that depends on the training.
        num_records: How many records there will be; None if no number of steps was given.
    """

    measure: str
    source: str
    record_bytes: int | None
    num_records: int | None

    @property
    def num_bytes(self) -> int | None:
        """The bytes of all records; None if that is not known."""
        if self.record_bytes is None or self.num_records is None:
            return None
        return self.record_bytes * self.num_records


class Estimate(TextTable[MeasureEstimate]):
    """What each measure will write, as a list that prints as a table.

    Args:
        items: One per measure.
    """

    _columns = ("measure", "source", "one record", "records", "in all")

    @property
    def step_bytes(self) -> int:
        """The bytes of a step at which everything is due, as far as they are known."""
        return sum(item.record_bytes or 0 for item in self._items)

    @property
    def num_bytes(self) -> int:
        """The bytes of the whole recording, as far as they are known."""
        return sum(item.num_bytes or 0 for item in self._items)

    def _rows(self) -> Iterator[tuple[str, ...]]:
        for item in self._items:
            count = "" if item.num_records is None else f"{item.num_records:,}"
            whole = "" if item.num_records is None else _text(item.num_bytes)
            yield item.measure, item.source, _text(item.record_bytes), count, whole


def estimate(
    subject: Subject,
    measures: Sequence[Measure],
    when: Schedule,
    num_steps: int | None = None,
    steps_per_epoch: int | None = None,
) -> Estimate:
    """Estimate what measures will write.

    Args:
        subject: What is measured.
        measures: The measures.
        when: The schedule of those that have none.
        num_steps: The number of optimizer steps; None estimates a single record.
        steps_per_epoch: The number of steps in an epoch.
    """
    items = []
    for measure in measures:
        schedule = measure.when or when
        count = None if num_steps is None else _num_due(schedule, num_steps, steps_per_epoch)
        size = _record_bytes(measure, subject)
        items.append(MeasureEstimate(measure.name, measure.source, size, count))
    return Estimate(items)


def _record_bytes(measure: Measure, subject: Subject) -> int | None:
    parameters = subject.model.parameters()
    if any(isinstance(parameter, nn.UninitializedParameter) for parameter in parameters):
        return None
    try:
        return measure.record_bytes(subject)
    except Exception:  # The model may not be ready to run; recording will tell.
        return None


def _num_due(schedule: Schedule, num_steps: int, steps_per_epoch: int | None) -> int:
    count = 0
    for step in range(num_steps + 1):
        is_end = steps_per_epoch is not None and step > 0 and step % steps_per_epoch == 0
        epoch = step // steps_per_epoch if steps_per_epoch is not None and is_end else None
        count += schedule.is_due(step, epoch)
    return count


def _text(num_bytes: int | None) -> str:
    return "unknown" if num_bytes is None else size_text(num_bytes)
