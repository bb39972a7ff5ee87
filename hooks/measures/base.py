"""What a measure is: something recorded at due steps, from a source of examples."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import nn

from sonde.hooks.arguments import check_schedule
from sonde.hooks.examples.probe import Probe
from sonde.hooks.record import Observation, Recording, Subject
from sonde.hooks.schedule import Schedule
from sonde.hooks.training.source import Training, TrainingStep
from sonde.log import LogArray


class Measure(ABC):
    """One kind of record. A subclass says what it needs and records it.

    Attributes:
        name: Its name in the log.
        when: When it is due; None takes the recorder's schedule.
        probe: The examples it evaluates, if it evaluates a probe.
        training: The training itself, if its own passes are observed; then the measure has
            `observe`, otherwise `record`.
    """

    name: ClassVar[str]
    when: Schedule | None = None
    probe: Probe | None = None
    training: Training | None = None

    @property
    def is_sharded(self) -> bool:
        """Whether its probe is divided between ranks, so that rank 0 alone records it."""
        return self.probe is not None and self.probe.sharded

    @property
    @abstractmethod
    def source(self) -> str:
        """Where its examples come from, as the log names it."""

    @abstractmethod
    def check(self, model: nn.Module) -> None:
        """Refuse, before training starts, what cannot be recorded of this model.

        Raises:
            SondeError: If a layer, a target or an argument does not fit.
        """

    @abstractmethod
    def table(self) -> Sequence[LogArray]:
        """Return arrays of the source that do not depend on the step."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return what the run's description says of the measure, as JSON values."""

    def record_bytes(self, subject: Subject) -> int | None:
        """Estimate the bytes of the arrays of one record; None if the training decides them."""
        return None

    def record(self, subject: Subject) -> Recording:
        """Measure now; whatever this raises switches the measure off, not the training."""
        raise NotImplementedError

    def observe(self, subject: Subject, step: TrainingStep) -> Observation:
        """Begin to observe a step of the training, from the model's next forward pass on."""
        raise NotImplementedError


class ProbeMeasure(Measure):
    """A measure that evaluates a probe.

    Args:
        probe: The examples; what `Probe` takes is accepted too.
        when: When it is due; None takes the recorder's schedule.
    """

    def __init__(self, probe: Probe | Any, *, when: Schedule | None = None) -> None:
        check_schedule(when)
        self.probe: Probe = probe if isinstance(probe, Probe) else Probe(probe)
        self.when = when

    @property
    def source(self) -> str:
        """The name of the probe."""
        return self.probe.name or "probe"

    def check(self, model: nn.Module) -> None:
        """Accept every model; subclasses refuse what they cannot record."""

    def table(self) -> Sequence[LogArray]:
        """Return the ids and targets of the probe."""
        return self.probe.table()
