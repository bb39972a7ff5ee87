"""What a measure is: something recorded at due steps, from a source of examples."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from sonde.hooks.arguments import check_schedule
from sonde.hooks.probes import Probe
from sonde.hooks.schedule import Schedule
from sonde.hooks.training import Training, TrainingStep
from sonde.log import LogArray


@dataclass
class Subject:
    """What is measured.

    Attributes:
        model: The user's own module, without wrappers.
        optimizers: The optimizers the recorder is attached to.
        scalars: The latest value of everything given to `recorder.log`.
    """

    model: nn.Module
    optimizers: list[torch.optim.Optimizer] = field(default_factory=list)
    scalars: dict[str, Any] = field(default_factory=dict)


@dataclass
class Recording:
    """What a measure recorded at one step.

    Attributes:
        arrays: The arrays.
        attributes: What else the record says of itself, as JSON values.
        missing: What could not be recorded, with the reason, by layer or parameter name.
        notes: Facts that seldom change, by event; they are logged when they differ from before.
        warnings: What is warned of and noted, once in a training, by what it is about.
    """

    arrays: list[LogArray] = field(default_factory=list)
    attributes: dict[str, Any] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    notes: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    warnings: Mapping[str, str] = field(default_factory=dict)


class Observation(ABC):
    """A measure of the training itself at one due step, while its passes run."""

    @abstractmethod
    def finish(self) -> Recording:
        """Return what was seen; whatever this raises switches the measure off."""

    @abstractmethod
    def stop(self) -> None:
        """Leave the model as it was."""


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
