"""The recorder: counts steps, asks schedules, runs measures, and writes what they return.

Nothing here raises into the training once it runs: a measure that fails is warned of once, marked
in the log and switched off. What is wrong with the arguments is raised by the constructor, before
any training.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch
from torch import nn

from sonde.exceptions import InvalidInputError
from sonde.log import LogWriter
from sonde.log.appender import Sync

from . import closing
from .before_training import agree, check_arguments, check_size, describe, now
from .environment import environment, process_rank
from .estimate import Estimate, estimate
from .live import LiveMeasures
from .measures.base import Measure, Recording, Subject
from .measures.scalars import latest_numbers
from .record_log import RecordLog
from .run_directory import create_run
from .schedule import Schedule, log_spaced
from .select import unwrap
from .sources import check_names, name_probes
from .training import Batch, BatchContext, make_batch


class Recorder:
    """Records a training into a run directory.

    Attach it to the optimizer, or call `step()` after each optimizer step. As a context manager it
    closes itself; without, it closes at interpreter exit. Each measure is due by its own schedule,
    or by the recorder's. A measure due at step 0 is taken at the first optimizer step, before the
    weights change, when BatchNorm statistics have seen one batch; `measure()` before the loop takes
    it earlier, and has to where no optimizer is attached.

    Args:
        path: The run directory; it must not hold a run yet.
        model: The model that is trained, wrapped (DistributedDataParallel, torch.compile) or not.
        measures: What to record.
        when: The schedule of measures that have none; by default log-spaced, for ever.
        config: Anything that describes the run, such as hyperparameters; what is no JSON value is
            written as its text.
        steps_per_epoch: The number of optimizer steps in an epoch, for schedules by epoch.
        resume: Go on with a run that is already there, as a new attempt of it. Without
            `load_state_dict` it starts again at step 0. What earlier attempts recorded from the
            step on at which this one starts is superseded; nothing is deleted.
        overwrite: Delete a run that is already there.
        on_error: `warn`, or `raise` to debug a measure: then its exception ends the training.
        sync: When the log is forced to the disk; see `LogWriter`.
        queue_bytes: How many bytes may wait to be written.
        block: Wait when the queue is full, instead of dropping records after a while.
        max_step_bytes: Refuse to start if a step at which everything is due would write more than
            this, by `estimate`.

    Attributes:
        num_steps: Completed optimizer steps.
        num_epochs: Completed epochs.

    Raises:
        InvalidInputError: If an argument does not fit the model or the others, or a step would
            write too much.
        LayerNotFoundError: If a selector takes no layer.
        UnsupportedModelError: If the model runs no hooks.
        RunExistsError: If the directory holds a run.
        MismatchError: If the run to resume was recorded with other examples or measures.
        OSError: If the directory cannot be written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        model: nn.Module,
        measures: Sequence[Measure],
        *,
        when: Schedule | None = None,
        config: Mapping[str, Any] | None = None,
        steps_per_epoch: int | None = None,
        resume: bool = False,
        overwrite: bool = False,
        on_error: Literal["warn", "raise"] = "warn",
        sync: Sync = "seal",
        queue_bytes: int = 256 << 20,
        block: bool = False,
        max_step_bytes: int = 8 << 30,
    ) -> None:
        self.path = Path(path)
        self.num_steps = 0
        self.num_epochs = 0
        self._epoch_step = 0
        self._subject = Subject(unwrap(model))
        self._measures = list(measures)
        self._when = log_spaced() if when is None else when
        self._steps_per_epoch = steps_per_epoch
        self._on_error = on_error
        check_arguments(measures, on_error, steps_per_epoch)
        name_probes(self._measures)
        check_names(self._measures)
        for measure in self._measures:
            measure.check(self._subject.model)
        rank, num_ranks = process_rank(os.environ)
        agree(self._measures, self._subject.model, num_ranks)
        check_size(self.estimate(), max_step_bytes)
        self._done: dict[Measure, int] = {}
        self._recorded_before: set[Measure] = set()  # At the step of the checkpoint.
        self._ends: list[Callable[[], None]] = []
        self._is_closed = False
        self._has_started = False
        self._is_unstated = resume
        trainings = [m.training for m in self._measures if m.training is not None]
        self._live = LiveMeasures(self._subject, trainings[0]) if trainings else None
        tables = {
            measure.source: (measure.table(), measure.probe.describe() if measure.probe else {})
            for measure in self._measures
            if not (rank and measure.is_sharded)
        }
        # What it evaluates together with the other ranks, rank 0 records.
        self._silent = [m for m in self._measures if rank and m.is_sharded]
        about = environment()
        if resume and overwrite:
            raise InvalidInputError("give `resume` or `overwrite`, not both")
        description = describe(
            self.path, self._measures, self._when, self._subject.model, config, about
        )
        attempt = create_run(self.path, description, rank, resume=resume, overwrite=overwrite)
        writer = LogWriter(
            self.path,
            attempt=attempt,
            rank=rank,
            about={
                "world_size": num_ranks,
                # Not known yet, until a checkpoint is loaded or the first step is counted.
                "resume_step": None if resume else 0,
                "records_nothing": len(self._silent) == len(self._measures),
                "started": now(),
                "hostname": about["hostname"],
            },
            sync=sync,
            queue_bytes=queue_bytes,
            block=block,
        )
        self._log = RecordLog(writer)
        closing.register(self)
        for source, (table, about_source) in tables.items():
            if table:
                writer.add_table(source, table, about_source)
        self._begin_live(0)

    @property
    def num_records(self) -> int:
        """How many records this process has taken."""
        return self._log.num_records

    @property
    def num_bytes(self) -> int:
        """How many bytes their arrays have."""
        return self._log.num_bytes

    def attach(self, optimizer: torch.optim.Optimizer) -> Recorder:
        """Count the steps of an optimizer, and measure after those that are due.

        Args:
            optimizer: Any `torch.optim.Optimizer`. Of several that step in turn, attach one.

        Returns:
            The recorder.

        Raises:
            InvalidInputError: If it is no optimizer, or one is attached already.
        """
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise InvalidInputError(
                f"`optimizer` is a {type(optimizer).__name__}; expected a torch.optim.Optimizer. "
                "Without one, call recorder.step() after each step"
            )
        if self._subject.optimizers:
            raise InvalidInputError(
                "an optimizer is attached already, and a step is counted once; with several "
                "optimizers attach the one that defines a step"
            )

        def before(_: object, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            # A closure computes gradients within the step, be they all or the last of several.
            is_complete = not args and kwargs.get("closure") is None
            if is_complete and self._live is not None and self._live.has_gradients:
                self._finish_live()
            self.start()

        def after(*_: object) -> None:
            self.step()

        self.at_close(
            optimizer.register_step_pre_hook(before).remove,
            optimizer.register_step_post_hook(after).remove,
        )
        self._subject.optimizers.append(optimizer)
        return self

    @property
    def scalars(self) -> Mapping[str, Any]:
        """The latest value of everything given to `log`."""
        return self._subject.scalars

    @property
    def is_attached(self) -> bool:
        """Whether an optimizer is attached, which counts the steps."""
        return bool(self._subject.optimizers)

    def at_close(self, *ends: Callable[[], None]) -> None:
        """Call functions once when the recorder closes, such as those that remove hooks."""
        self._ends += ends

    def start(self) -> None:
        """Take what is due before the first step, unless that was done.

        An attached recorder does it when the optimizer first steps; call it where that is too late,
        as the optimizer runs the forward pass itself, in a closure.
        """
        if not self._has_started:
            self._has_started = True
            self._measure_due(0)

    def step(self) -> None:
        """Count one optimizer step, and measure what is due; `attach` does this by itself."""
        self._finish_live()
        if not self._has_started:
            self._warn_of_missed_start()
            self._has_started = True
        self.num_steps += 1
        self._recorded_before.clear()
        epoch = None
        if self._steps_per_epoch and self.num_steps % self._steps_per_epoch == 0:
            self.num_epochs += 1
            self._epoch_step = self.num_steps
            epoch = self.num_epochs
        self._measure_due(self.num_steps, epoch)
        self._begin_live(self.num_steps, epoch)

    def epoch(self) -> None:
        """Say that an epoch has ended; not needed where `steps_per_epoch` is given."""
        if self._steps_per_epoch:
            return
        self.num_epochs += 1
        self._epoch_step = self.num_steps
        self._measure_due(self.num_steps, self.num_epochs)
        self._begin_live(self.num_steps, self.num_epochs)

    def log(self, **values: Any) -> None:
        """Note the latest value of scalars, such as the loss; `Scalars` records them when due.

        Call it before the optimizer steps: a due step records what was noted before it.

        Args:
            values: Numbers, or tensors with one element, by name.
        """
        for name, value in values.items():
            self._subject.scalars[name] = (
                value.detach() if isinstance(value, torch.Tensor) else value
            )

    def measure(self) -> None:
        """Take every measure now, whether it is due or not, but those of the training itself."""
        for measure in list(self._measures):
            if measure.training is None:
                self._take(measure)

    def estimate(self, num_steps: int | None = None) -> Estimate:
        """Estimate how many bytes will be written.

        Args:
            num_steps: The number of optimizer steps of the training; without it, of one record.

        Returns:
            One `MeasureEstimate` each, which prints as a table. What the size of the live batch
            decides, and what fails on the model as it is now, is unknown.
        """
        return estimate(self._subject, self._measures, self._when, num_steps, self._steps_per_epoch)

    def batch(
        self,
        ids: Any = None,
        targets: Any = None,
        loss: torch.Tensor | None = None,
        *,
        reduction: Literal["mean", "sum"] = "mean",
        divided_by: float = 1,
        num_real: int | None = None,
    ) -> BatchContext:
        """Tell of a micro-batch what only the loop knows, for the measures of the training itself.

        Call it between the forward pass and the backward pass; or put both into it, as in
        `with recorder.batch(ids=ids):`, and give the loss by another call inside. Without it,
        examples are known by their order of arrival alone, and gradients are recorded as they come
        back. Where nothing is due it does nothing.

        Args:
            ids: One integer per example, the same in every epoch and on every rank.
            targets: One target per example, to be recorded with them.
            loss: The loss of this micro-batch, a tensor with one element on the way to what
                `backward` is called on. What multiplies it there is divided out of gradients.
            reduction: How it is made of the losses of the examples: their `mean` or `sum`.
            divided_by: What it was divided by already, as some trainers divide it by the number of
                accumulated micro-batches before they show it.
            num_real: How many of the examples count, from the first on, where the others are copies
                that only fill up the batch, so that all ranks have as many; the record has
                `is_duplicate` then.

        Returns:
            A context manager; it need not be used as one.
        """
        step = None if self._live is None else self._live.step
        if step is not None:
            try:
                batch = make_batch(ids, targets, loss, reduction, divided_by, num_real)
                return BatchContext(step, batch, loss)
            except Exception as error:
                if self._on_error == "raise":
                    raise
                self._log.warn(f"recorder.batch() is ignored: {error}", once="batch")
        return BatchContext(None, Batch(), None)

    @property
    def is_observing(self) -> bool:
        """Whether the training's passes are recorded now, so that `batch` has somebody to tell."""
        step = None if self._live is None else self._live.step
        return step is not None and not step.is_paused

    def warn(self, message: str) -> None:
        """Warn once of something that cannot be recorded, and note it in the log; raise nothing."""
        if not self._log.has_warned(message) and not self._is_closed:
            self._log.note("missed", self.num_steps, reason=message)
        self._log.warn(message)

    def state_dict(self, *, sync: bool = True) -> dict[str, Any]:
        """Return what a checkpoint has to hold for the recording to go on from it.

        Args:
            sync: Force everything recorded so far to the disk first, so that the log is never
                behind the checkpoint.

        Returns:
            Numbers, and a dict of the numbers that `log` was given.
        """
        if sync:
            self.sync()
        return {
            "version": 1,
            "num_steps": self.num_steps,
            "num_epochs": self.num_epochs,
            "epoch_step": self._epoch_step,
            "scalars": latest_numbers(self._subject.scalars),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint; call it before the first step, with `resume=True`.

        What was recorded up to the checkpoint's step stays; what earlier attempts recorded after it
        is superseded.

        Args:
            state: What `state_dict` returned.

        Raises:
            InvalidInputError: If it is no such state, or recording has begun already.
        """
        expected = {"version", "num_steps", "num_epochs"}
        if not expected <= state.keys() or state["version"] != 1:
            raise InvalidInputError(
                f"`state` has {sorted(state)} and version {state.get('version')}; expected what "
                "recorder.state_dict() of this version of sonde returned"
            )
        if self._has_started or self._done:
            raise InvalidInputError(
                f"recording has begun already (step {self.num_steps}); load the state before the "
                "first step"
            )
        self.num_steps = state["num_steps"]
        self.num_epochs = state["num_epochs"]
        self._has_started = True
        self._is_unstated = False
        if self._live is not None:
            self._live.stop()  # Of step 0, before it was known where this goes on.
        self._epoch_step = state.get("epoch_step", 0)
        self._subject.scalars.update(state.get("scalars", {}))
        self._log.writer.resume_at(self.num_steps + 1)
        has_ended = self.num_epochs > 0 and self._epoch_step == self.num_steps
        epoch = self.num_epochs if has_ended else None
        self._recorded_before = {
            m for m in self._measures if self._is_due(m, self.num_steps, epoch)
        }
        self._begin_live(self.num_steps, epoch)

    def sync(self) -> None:
        """Return once everything recorded so far would survive a power loss."""
        self._log.writer.sync()

    def close(self, reason: str = "closed", timeout: float | None = None) -> None:
        """Write what is queued, seal the log, and let go of the optimizer; safe to call twice.

        Args:
            reason: Why the recording ends, for the log.
            timeout: How many seconds to wait for the disk; None is no limit.
        """
        if self._is_closed:
            self._log.writer.close(reason, timeout)  # Only waits.
            return
        self._is_closed = True
        if self._live is not None:
            self._live.stop()
        for end in self._ends:
            end()
        self._report_idle_schedules()
        self._log.writer.close(reason, timeout)
        self._log.warn_of_trouble()
        closing.forget(self)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close("closed" if kind is None else kind.__name__)

    def __repr__(self) -> str:
        names = ", ".join(f"{m.name} ({m.source})" for m in self._measures)
        return f"<Recorder {str(self.path)!r} at step {self.num_steps}: {names}>"

    def _measure_due(self, step: int, epoch: int | None = None) -> None:
        if self._is_closed:
            return
        for measure in list(self._measures):
            if (
                measure.training is None
                and self._is_due(measure, step, epoch)
                and measure not in self._recorded_before
            ):
                self._take(measure)

    def _is_due(self, measure: Measure, step: int, epoch: int | None) -> bool:
        return (measure.when or self._when).is_due(step, epoch)

    def _begin_live(self, step: int, epoch: int | None = None) -> None:
        """Observe the training between this step and the next, if that is due."""
        if self._live is None or self._is_closed:
            return
        due = [
            measure
            for measure in self._measures
            if measure.training is not None and self._is_due(measure, step, epoch)
        ]
        for measure, error in self._live.begin(due).items():
            self._fail(measure, error)

    def _finish_live(self) -> None:
        """Record what was seen of the training since the last step."""
        if self._live is None or self._live.step is None or self._is_closed:
            return
        self._state_start()
        for measure, seen in self._live.finish().items():
            self._done[measure] = self.num_steps
            try:
                if isinstance(seen, Exception):
                    raise seen
                self._keep(measure, seen)
            except Exception as error:
                self._fail(measure, error)
        self._log.warn_of_trouble()

    def _state_start(self) -> None:
        if self._is_unstated:
            self._is_unstated = False
            self._log.writer.resume_at(0)

    def _take(self, measure: Measure) -> None:
        if self._is_closed or self._done.get(measure) == self.num_steps:
            return
        self._state_start()
        if any(isinstance(p, nn.UninitializedParameter) for p in self._subject.model.parameters()):
            # A probe would be the first to run the model, and decide its initial weights.
            reason = "lazy layers have no parameters before the training's first forward pass"
            self._log.note("missed", self.num_steps, measures=[measure.name], reason=reason)
            self._log.warn(f"{measure.name} was not taken at step {self.num_steps}: {reason}")
            return
        self._done[measure] = self.num_steps
        try:
            with nullcontext() if self._live is None else self._live.paused():
                recording = measure.record(self._subject)
            self._keep(measure, recording)
        except Exception as error:  # Training is sacred: whatever fails here must not end it.
            self._fail(measure, error)
        self._log.warn_of_trouble()

    def _keep(self, measure: Measure, recording: Recording) -> None:
        if measure not in self._silent:
            self._log.write(measure, recording, self.num_steps)

    def _fail(self, measure: Measure, error: Exception) -> None:
        """Switch a measure off; or raise what is wrong, to debug it."""
        if self._on_error == "raise":
            raise error
        self._measures.remove(measure)
        reason = f"{type(error).__name__}: {error}"
        self._log.note(
            "disabled", self.num_steps, measure=measure.name, source=measure.source, reason=reason
        )
        self._log.warn(
            f"{measure.name} of '{measure.source}' failed at step {self.num_steps} and is switched "
            f"off; the training goes on ({reason})"
        )

    def _warn_of_missed_start(self) -> None:
        missed = [
            measure.name
            for measure in self._measures
            if measure.training is None
            and self._is_due(measure, 0, None)
            and measure not in self._done
        ]
        if missed and not self._is_closed:
            reason = (
                "step 0 was due, but the first call came after one step; call recorder.measure() "
                "before the loop, or recorder.attach(optimizer)"
            )
            self._log.note("missed", 0, measures=missed, reason=reason)
            self._log.warn(reason)

    def _report_idle_schedules(self) -> None:
        idle = [
            measure
            for measure in self._measures
            if (measure.when or self._when).needs_epochs and not self.num_epochs
        ]
        if idle and self.num_steps:
            reason = (
                "no epoch was ever counted; give steps_per_epoch, or call recorder.epoch() at the "
                "end of each"
            )
            names = [measure.name for measure in idle]
            self._log.note("missed", self.num_steps, measures=names, reason=reason)
            self._log.warn(f"{', '.join(names)} is scheduled by epochs, but {reason}")
