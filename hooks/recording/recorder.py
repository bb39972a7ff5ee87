"""The recorder: follows a training, counts its steps, and has what is due measured and written.

Nothing here raises into the training once it runs. What is wrong with the arguments is raised by
the constructor, before any training.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch
from torch import nn

from sonde.exceptions import InvalidInputError
from sonde.hooks.arguments import check_schedule
from sonde.hooks.measures.base import Measure
from sonde.hooks.measures.scalars import latest_numbers
from sonde.hooks.model.layers import unwrap
from sonde.hooks.record import Subject
from sonde.hooks.schedule import Schedule, log_spaced
from sonde.hooks.training.micro_batches import Batch, make_batch
from sonde.hooks.training.optimizer_steps import AttachedOptimizer, SkippedUpdates
from sonde.hooks.training.source import BatchContext
from sonde.log import LogWriter
from sonde.log.format.endings import why_ended
from sonde.log.writing.appender import Sync

from . import closing
from .due import DueMeasures
from .environment import process_rank
from .estimate import Estimate, estimate
from .preparation import check_arguments, check_size, describe, describe_attempt, prepare
from .record_log import RecordLog
from .run_directory import created_run, free_path


class Recorder:
    """Records a training into a run directory.

    Attach it to the optimizer, or call `step()` after each optimizer step. As a context manager it
    closes itself; without, it closes at interpreter exit. Each measure is due by its own schedule,
    or by the recorder's. A measure due at step 0 is taken at the first optimizer step, before the
    weights change, when BatchNorm statistics have seen one batch; `measure()` before the loop takes
    it earlier, and has to where no optimizer is attached.

    Args:
        path: The run directory; it must not hold a run yet in which something is recorded. Where
            another recorder of this process uses it, as in a notebook, `path-2` is taken.
        model: The model that is trained, wrapped (DistributedDataParallel, torch.compile) or not.
        measures: What to record.
        when: The schedule of measures that have none; by default log-spaced, for ever.
        config: Anything that describes the run, such as hyperparameters; numbers of NumPy and torch
            are numbers, what else is no JSON value is written as its text.
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
        self._num_steps = 0  # And what is still to be known as skipped.
        self._skipped = SkippedUpdates()
        self._attached: AttachedOptimizer | None = None
        self.num_epochs = 0
        self._epoch_step = 0
        self._subject = Subject(unwrap(model))
        check_schedule(when)
        self._when = log_spaced() if when is None else when
        self._steps_per_epoch = steps_per_epoch
        self._on_error = on_error
        self._ends: list[Callable[[], None]] = []
        self._is_closed = False
        self._has_started = False
        measures = check_arguments(measures, on_error, steps_per_epoch)
        rank, num_ranks = process_rank(os.environ)
        prepare(measures, self._subject.model, num_ranks)
        check_size(
            estimate(self._subject, measures, self._when, None, steps_per_epoch), max_step_bytes
        )
        # What it evaluates together with the other ranks, rank 0 records.
        silent = [m for m in measures if rank and m.is_sharded]
        tables = {
            measure.source: (measure.table(), measure.probe.describe() if measure.probe else {})
            for measure in measures
            if measure not in silent
        }
        if resume and overwrite:
            raise InvalidInputError("give `resume` or `overwrite`, not both")
        is_alone = num_ranks == 1
        self.path = free_path(self.path, is_alone=is_alone, resume=resume, overwrite=overwrite)
        description = describe(self.path, measures, self._when, self._subject.model, config)
        about = describe_attempt(
            num_ranks, resume=resume, records_nothing=len(silent) == len(measures)
        )
        with created_run(
            self.path, description, rank, resume=resume, overwrite=overwrite
        ) as attempt:
            writer = LogWriter(
                self.path,
                attempt=attempt,
                rank=rank,
                about=about,
                sync=sync,
                queue_bytes=queue_bytes,
                block=block,
            )
        self._log = RecordLog(writer, is_start_stated=not resume)
        self._due = DueMeasures(
            measures, self._when, self._subject, self._log, silent=silent, on_error=on_error
        )
        closing.register(self)
        for source, (table, about_source) in tables.items():
            if table:
                writer.add_table(source, table, about_source)
        self._due.begin_live(0)

    @property
    def num_steps(self) -> int:
        """Completed optimizer steps; an update that a GradScaler had skipped is none."""
        self._num_steps -= self._skipped.take()
        return self._num_steps

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
            optimizer: Any `torch.optim.Optimizer` that calls its hooks. Of several that step in
                turn, attach one. One that calls others within its step, or leaves its step to one
                that it holds, such as SAM, is counted once for each update.

        Returns:
            The recorder.

        Raises:
            InvalidInputError: If it is no optimizer that calls hooks, or one is attached already.
        """
        if self._attached is not None:
            raise InvalidInputError(
                "an optimizer is attached already, and a step is counted once; with several "
                "optimizers attach the one that defines a step"
            )
        model = self._subject.model
        self._attached = AttachedOptimizer(optimizer, model, self._before_update, self._updated)
        self.at_close(self._attached.detach)
        self._subject.optimizers.append(optimizer)
        return self

    def _before_update(self, is_complete: bool) -> None:
        """Finish what is observed before the weights change, unless more gradients are to come."""
        if is_complete and self._due.has_gradients and not self._is_update_skipped():
            self._due.finish_live(self.num_steps, is_before_update=True)
        self.start()

    def _updated(self) -> None:
        """Count an update, unless it was skipped; look at once only where something may be due."""
        assert self._attached is not None  # It has called.
        found_inf = self._attached.found_inf
        if found_inf is not None:
            can_wait = found_inf.device.type != "cpu" and not self._is_next_awaited()
            if can_wait:
                self._skipped.add(found_inf)
                self._num_steps += 1
                return
            if self._is_update_skipped():
                return
        self.step()

    def _is_update_skipped(self) -> bool:
        found_inf = None if self._attached is None else self._attached.found_inf
        return found_inf is not None and bool(found_inf)

    def _is_next_awaited(self) -> bool:
        """Tell whether the next step matters as such; there are never more than are counted."""
        step = self._num_steps + 1
        ends_epoch = bool(self._steps_per_epoch) and step % (self._steps_per_epoch or 1) == 0
        return ends_epoch or self._due.live_step is not None or self._due.is_due(step)

    @property
    def scalars(self) -> Mapping[str, Any]:
        """The latest value of everything given to `log`."""
        return self._subject.scalars

    @property
    def is_attached(self) -> bool:
        """Whether an optimizer is attached, which counts the steps."""
        return self._attached is not None

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
            self._due.take_due(0)

    def step(self) -> None:
        """Count one optimizer step, and measure what is due; `attach` does this by itself."""
        self._num_steps = self.num_steps  # Without those that were skipped.
        self._due.finish_live(self._num_steps)
        if not self._has_started:
            self._due.warn_of_missed_start()
            self._has_started = True
        self._num_steps += 1
        epoch = None
        if self._steps_per_epoch and self._num_steps % self._steps_per_epoch == 0:
            self.num_epochs += 1
            self._epoch_step = self._num_steps
            epoch = self.num_epochs
        self._due.take_due(self._num_steps, epoch)
        self._due.begin_live(self._num_steps, epoch)

    def epoch(self) -> None:
        """Say that an epoch has ended; not needed where `steps_per_epoch` is given."""
        if self._steps_per_epoch:
            return
        self.num_epochs += 1
        self._epoch_step = self.num_steps
        self._due.take_due(self.num_steps, self.num_epochs)
        self._due.begin_live(self.num_steps, self.num_epochs)

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
        self._due.take_all(self.num_steps)

    def estimate(self, num_steps: int | None = None) -> Estimate:
        """Estimate how many bytes will be written.

        Args:
            num_steps: The number of optimizer steps of the training; without it, of one record.

        Returns:
            One `MeasureEstimate` each, which prints as a table. What the size of the live batch
            decides, and what fails on the model as it is now, is unknown.
        """
        measures = self._due.measures
        return estimate(self._subject, measures, self._when, num_steps, self._steps_per_epoch)

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
        """Describe the current micro-batch: its ids, targets and loss, for measures of TRAINING.

        Call it between the forward pass and the backward pass; or put both into it, as in
        `with recorder.batch(ids=ids):`, and pass the loss by another call inside. Without it,
        examples are known only by their order of arrival, and gradients are recorded as they
        arrive. Where nothing is due it does nothing.

        Args:
            ids: One integer per example, the same in every epoch and on every rank.
            targets: One target per example, to be recorded with them.
            loss: The loss of this micro-batch, a tensor with one element; `backward` is called on
                it, or on something computed from it. Factors applied after it, such as a loss
                scale, are divided out of the recorded gradients.
            reduction: Whether the loss is the `mean` or the `sum` of the examples' losses.
            divided_by: What the loss was divided by already; some trainers divide it by the number
                of accumulated micro-batches first.
            num_real: How many of the examples count, from the first on. The others are copies that
                give all ranks batches of equal size; the record marks them by `is_duplicate`.

        Returns:
            A context manager; it need not be used as one.
        """
        step = self._due.live_step
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
        """Whether the training's passes are recorded now, so that `batch` has an effect."""
        step = self._due.live_step
        return step is not None and not step.is_paused

    def warn(self, message: str) -> None:
        """Warn once of something that cannot be recorded, and note it in the log; raise nothing."""
        if not self._log.has_warned(message) and not self._is_closed:
            self._log.note("missed", self.num_steps, reason=message)
        self._log.warn(message)

    def note_missed(self, reason: str) -> None:
        """Note in the log what is not recorded, where it is said elsewhere."""
        self._log.note("missed", self.num_steps, reason=reason)

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
        if self._has_started or self._due.has_begun:
            raise InvalidInputError(
                f"recording has begun already (step {self.num_steps}); load the state before the "
                "first step"
            )
        self._num_steps = state["num_steps"]
        self.num_epochs = state["num_epochs"]
        self._has_started = True
        self._epoch_step = state.get("epoch_step", 0)
        self._subject.scalars.update(state.get("scalars", {}))
        self._log.resume_at(self.num_steps + 1)
        has_ended = self.num_epochs > 0 and self._epoch_step == self.num_steps
        self._due.go_on_from(self.num_steps, self.num_epochs if has_ended else None)

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
        no_step = None if self._attached is None else self._attached.why_no_step()
        if no_step is not None:
            self.warn(no_step)
        self._is_closed = True
        self._due.stop()
        for end in self._ends:
            end()
        if self.num_steps and not self.num_epochs:
            self._due.warn_of_missed_epochs(self.num_steps)
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
        self.close(why_ended(error))

    def __repr__(self) -> str:
        names = ", ".join(f"{m.name} ({m.source})" for m in self._due.measures)
        return f"<Recorder {str(self.path)!r} at step {self.num_steps}: {names}>"
