"""The measures of a recorder: taken when they are due, and switched off when they fail.

Nothing here raises into the training, unless that is asked for: a measure that fails is warned of
once, marked in the log and switched off.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Literal

from torch.nn.parameter import is_lazy

from sonde.hooks.measures.base import Measure
from sonde.hooks.model.own_work import evaluating
from sonde.hooks.model.state import MadeParametersError
from sonde.hooks.model.walks import parameters_of
from sonde.hooks.record import Recording, Subject
from sonde.hooks.schedule import Schedule
from sonde.hooks.training.optimizer_steps import weights_seen
from sonde.hooks.training.source import TRAINING, TrainingStep

from .failures import reason_for
from .live import LiveMeasures
from .probe_precision import ProbePrecision
from .record_log import RecordLog


class DueMeasures:
    """Takes measures when they are due, and writes what they return.

    Args:
        measures: The measures.
        when: The schedule of those that have none.
        subject: What is measured.
        log: Where records, notes and warnings go.
        silent: Those that are taken together with other ranks, and written by another one.
        on_error: `warn`, or `raise` what a measure raises.

    Attributes:
        measures: Those that have not failed.
    """

    def __init__(
        self,
        measures: Sequence[Measure],
        when: Schedule,
        subject: Subject,
        log: RecordLog,
        *,
        silent: Collection[Measure],
        on_error: Literal["warn", "raise"],
    ) -> None:
        self.measures = list(measures)
        self._when = when
        self._subject = subject
        self._log = log
        self._silent = silent
        self._precision = ProbePrecision(subject, log)
        self._on_error = on_error
        self._taken_at: dict[Measure, int] = {}
        self._resumed_at: int | None = None
        self._taken_before: set[Measure] = set()  # At the step of the checkpoint.
        self._is_stopped = False
        trainings = [m.training for m in self.measures if m.training is not None]
        self._live = LiveMeasures(subject, trainings[0]) if trainings else None

    @property
    def has_begun(self) -> bool:
        """Whether a measure was taken."""
        return bool(self._taken_at)

    @property
    def live_step(self) -> TrainingStep | None:
        """The step of the training that is observed now, if it is."""
        return None if self._live is None else self._live.step

    @property
    def has_gradients(self) -> bool:
        """Whether a backward pass has come through since the observed step was begun."""
        return self._live is not None and self._live.has_gradients

    def is_due(self, step: int) -> bool:
        """Tell whether any measure is due at a step within an epoch."""
        return any(self._is_due(measure, step, None) for measure in self.measures)

    def take_due(self, step: int, epoch: int | None = None) -> None:
        """Take what is due at a step, and at the end of an epoch if one is given."""
        for measure in list(self.measures):
            if (
                measure.training is None
                and self._is_due(measure, step, epoch)
                and not (step == self._resumed_at and measure in self._taken_before)
            ):
                self._take(measure, step)

    def take_all(self, step: int) -> None:
        """Take every measure, whether it is due or not, but those of the training itself."""
        for measure in list(self.measures):
            if measure.training is None:
                self._take(measure, step)

    def begin_live(self, step: int, epoch: int | None = None) -> None:
        """Observe the training between this step and the next, if that is due."""
        if self._live is None or self._is_stopped:
            return
        due = [
            measure
            for measure in self.measures
            if measure.training is not None and self._is_due(measure, step, epoch)
        ]
        for measure, error in self._live.begin(due).items():
            self._fail(measure, error, step)

    def finish_live(self, step: int, *, is_before_update: bool = False) -> None:
        """Record what was seen of the training since the last step.

        Args:
            step: The step.
            is_before_update: The attached optimizer updates the weights next.
        """
        if self._live is None or self._live.step is None or self._is_stopped:
            return
        self._log.state_start()
        seen_step = self._live.step
        finished = self._live.finish(is_before_update=is_before_update)
        self._warn_of_dropped(seen_step.dropped, step)
        if seen_step.misuse is not None:
            self._log.note("missed", step, reason=seen_step.misuse)
            self._log.warn(f"at step {step} {seen_step.misuse}", once="misuse")
        for measure, seen in finished.items():
            self._taken_at[measure] = step
            try:
                if isinstance(seen, Exception):
                    raise seen
                self._write(measure, seen, step)
            except Exception as error:
                self._fail(measure, error, step)
        self._log.warn_of_trouble()

    def go_on_from(self, step: int, epoch: int | None) -> None:
        """Go on from the checkpoint of a step, at which all that was due is recorded already.

        Args:
            step: The step of the checkpoint.
            epoch: The epoch that ended with it, if one did.
        """
        if self._live is not None:
            self._live.stop()  # Of step 0, before it was known where this goes on.
        self._resumed_at = step
        self._taken_before = {m for m in self.measures if self._is_due(m, step, epoch)}
        self.begin_live(step, epoch)

    def stop(self) -> None:
        """Let go of the model; nothing is taken from now on."""
        self._is_stopped = True
        if self._live is not None:
            self._live.stop()

    def warn_of_missed_start(self) -> None:
        """Warn of what was due at step 0 and was not taken."""
        missed = [
            measure.name
            for measure in self.measures
            if measure.training is None
            and self._is_due(measure, 0, None)
            and measure not in self._taken_at
        ]
        if missed and not self._is_stopped:
            reason = (
                "step 0 was due, but the first call came after one step; call recorder.measure() "
                "before the loop, or recorder.attach(optimizer)"
            )
            self._log.note("missed", 0, measures=missed, reason=reason)
            self._log.warn(reason)

    def warn_of_missed_epochs(self, step: int) -> None:
        """Warn of what is due by epochs, where none was counted up to a step."""
        names = [m.name for m in self.measures if (m.when or self._when).needs_epochs]
        if names:
            reason = (
                "no epoch was ever counted; give steps_per_epoch, or call recorder.epoch() at the "
                "end of each"
            )
            self._log.note("missed", step, measures=names, reason=reason)
            self._log.warn(f"{', '.join(names)} is scheduled by epochs, but {reason}")

    def _warn_of_dropped(self, dropped: Mapping[str, int], step: int) -> None:
        for reason, number in dropped.items():
            self._log.note("dropped", step, passes=number, reason=reason)
            batches = "a batch" if number == 1 else f"{number} batches"
            self._log.warn(
                f"records of the training at step {step} leave out {batches} that passed through "
                f"the model, because {reason}; later ones are only noted in the log",
                once=f"dropped: {reason}",
            )

    def _is_due(self, measure: Measure, step: int, epoch: int | None) -> bool:
        return (measure.when or self._when).is_due(step, epoch)

    def _take(self, measure: Measure, step: int) -> None:
        if self._is_stopped or self._taken_at.get(measure) == step:
            return
        self._log.state_start()
        if any(map(is_lazy, parameters_of(self._subject.model))):
            # A probe would be the first to run the model, and decide its initial weights.
            reason = "lazy layers have no parameters before the training's first forward pass"
            self._miss(measure, step, reason)
            return
        self._taken_at[measure] = step
        try:
            with evaluating(self._subject.model):
                recording = self._precision.record(measure)
            if measure.source != TRAINING.name:
                self._state_weights(recording, step)
            self._write(measure, recording, step)
        except MadeParametersError as reason:
            del self._taken_at[measure]
            self._miss(measure, step, str(reason))
        except Exception as error:  # Training is sacred: whatever fails here must not end it.
            self._fail(measure, error, step)
        self._log.warn_of_trouble()

    def _state_weights(self, recording: Recording, step: int) -> None:
        """Say in a record which weights a probe has seen, where an optimizer swaps them."""
        weights = weights_seen(self._subject.optimizers)
        if weights is None:
            return
        recording.attributes["weights"] = weights
        if weights.startswith("of training"):
            reason = (
                f"probes see the weights {weights}, not those that optimizer.eval() swaps in, as "
                "to swap them would change the training; to record these, call recorder.measure() "
                "between optimizer.eval() and optimizer.train()"
            )
            if not self._log.has_warned(reason):
                self._log.note("weights", step, reason=reason)
            self._log.warn(reason)

    def _miss(self, measure: Measure, step: int, reason: str) -> None:
        """Say why a measure that is due cannot be taken as yet."""
        self._log.note("missed", step, measures=[measure.name], reason=reason)
        self._log.warn(f"{measure.name} was not taken at step {step}: {reason}")

    def _write(self, measure: Measure, recording: Recording, step: int) -> None:
        if measure not in self._silent:
            self._log.write(measure, recording, step)

    def _fail(self, measure: Measure, error: Exception, step: int) -> None:
        """Switch a measure off; or raise what is wrong, to debug it."""
        if self._on_error == "raise":
            raise error
        self.measures.remove(measure)
        reason = reason_for(error)
        self._log.note("disabled", step, measure=measure.name, source=measure.source, reason=reason)
        self._log.warn(
            f"{measure.name} of '{measure.source}' could not be recorded at step {step}, so sonde "
            f"switches it off; the training goes on. Reason: {reason}"
        )
