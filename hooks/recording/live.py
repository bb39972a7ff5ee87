"""Measures of the training itself: begun when a step is due, finished before the weights change."""

from __future__ import annotations

from collections.abc import Sequence

from sonde.hooks.measures.base import Measure
from sonde.hooks.record import Observation, Recording, Subject
from sonde.hooks.training.batch_axes import BatchAxes
from sonde.hooks.training.source import Training, TrainingStep


class LiveMeasures:
    """Observes one step of the training at a time.

    Args:
        subject: What is measured.
        training: The source of the measures.
    """

    def __init__(self, subject: Subject, training: Training) -> None:
        self._subject = subject
        self._axes = BatchAxes(training.batch_dim)
        self._observed: dict[Measure, Observation] = {}
        self.step: TrainingStep | None = None

    @property
    def has_gradients(self) -> bool:
        """Whether a backward pass has come through since the step was begun."""
        return self.step is not None and bool(self.step.micro_batches)

    def begin(self, measures: Sequence[Measure]) -> dict[Measure, Exception]:
        """Observe the training from its next forward pass on; return the measures that failed."""
        failed: dict[Measure, Exception] = {}
        for measure in measures:
            if measure in self._observed:
                continue
            if self.step is None:
                model, optimizers = self._subject.model, self._subject.optimizers
                self.step = TrainingStep(model, self._axes, optimizers)
            try:
                self._observed[measure] = measure.observe(self._subject, self.step)
            except Exception as error:
                failed[measure] = error
        return failed

    def finish(self, *, is_before_update: bool) -> dict[Measure, Recording | Exception]:
        """Leave the model as it was; return what each measure saw, or why it failed.

        Args:
            is_before_update: The attached optimizer updates the weights next.
        """
        finished: dict[Measure, Recording | Exception] = {}
        if self.step is not None and self.step.error is None:
            try:
                self.step.settle(is_before_update=is_before_update)
            except Exception as error:
                self.step.error = error
        for measure, observation in self._observed.items():
            try:
                finished[measure] = observation.finish()
            except Exception as error:
                finished[measure] = error
        self.stop()
        return finished

    def stop(self) -> None:
        """Leave the model as it was; what was seen is dropped."""
        for observation in self._observed.values():
            observation.stop()
        if self.step is not None:
            self.step.stop()
        self._observed, self.step = {}, None
