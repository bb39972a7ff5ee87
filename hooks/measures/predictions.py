"""Predictions: the outputs of the model on a probe."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sonde.exceptions import InvalidInputError
from sonde.hooks.examples.axes import OutputAxes
from sonde.hooks.examples.probe import Probe, call, device_of, undisturbed
from sonde.hooks.examples.small_runs import seen_by
from sonde.hooks.losses.scores import Output, Scores, check_outputs
from sonde.hooks.model.ranks import Shards, agreed, collect, take_buffers_of_first
from sonde.hooks.record import Recording, Subject
from sonde.hooks.schedule import Schedule
from sonde.hooks.stores.host_copies import on_host, wait_for_copies
from sonde.hooks.stores.log_arrays import to_log_array

from .base import ProbeMeasure


class Predictions(ProbeMeasure):
    """Record the model's outputs on a probe, in eval mode, as `logits` [examples, classes].

    Of several outputs, the one called `logits` is recorded, else the only one that fits the targets
    of the probe: for classes, at least as many columns as there are, or one logit for two classes,
    whose sign decides. Where several fit, or none, `output` has to say which one.

    Args:
        probe: The examples.
        output: Which output: its name, position or path, such as `"logits"`, `1` or `"[heads][0]"`,
            or a function of what the model returns.
        when: When it is due; None takes the recorder's schedule.

    Raises:
        InvalidInputError: If `output` is nothing that says which one.
    """

    name = "predictions"

    def __init__(
        self,
        probe: Probe | Any,
        *,
        output: Output | None = None,
        when: Schedule | None = None,
    ) -> None:
        super().__init__(probe, when=when)
        self._scores = Scores(output, self.probe.targets, self.probe.axes)

    def check(self, model: nn.Module) -> None:
        """Refuse a model of whose outputs it is not clear which one is meant.

        Raises:
            InvalidInputError: If it is not clear.
        """
        number = min(2, self.probe.num_examples)
        inputs, _ = self.probe.rows(slice(0, number), device_of(model))
        check_outputs(model, inputs, lambda returned: self._scores.of(returned, number))

    def describe(self) -> dict[str, Any]:
        """Return what the run's description says of the measure."""
        return {"output": "logits"}

    def record_bytes(self, subject: Subject) -> int:
        """Estimate the bytes of one record, from a run on one example."""
        with undisturbed(subject.model), torch.no_grad():
            inputs, _ = self.probe.rows(slice(0, 1), device_of(subject.model))
            return (
                self.probe.num_examples * self._scores.of(call(subject.model, inputs), 1)[1].nbytes
            )

    def record(self, subject: Subject) -> Recording:
        """Run the probe forward and keep the outputs."""
        shards = self.probe.shards()
        if shards is not None:
            parts = collect(agreed(lambda: self._own_logits(subject.model, shards)))
            return Recording() if parts is None else _recording(torch.cat(parts))
        axes = OutputAxes(self.probe.axes, seen_by(subject.model, self.probe))
        batches = []
        with undisturbed(subject.model) as random_states, torch.no_grad():
            for rows in self.probe.slices():
                random_states.seed(rows.start)
                batches.append(on_host(self._logits(subject.model, rows, axes)))
        wait_for_copies()
        return _recording(torch.cat(batches))

    def _own_logits(self, model: nn.Module, shards: Shards) -> Tensor:
        """Return the outputs for the examples of this rank, on the CPU."""
        seen = seen_by(model, self.probe)
        axes = OutputAxes(self.probe.axes, seen)
        found = []
        with undisturbed(model) as random_states, torch.no_grad():
            take_buffers_of_first(model)
            seen("")  # By all ranks, of which some may need to know.
            for rows, is_own in shards.batches():
                random_states.seed(rows.start)
                logits = self._logits(model, rows, axes).cpu()
                found.append(logits if is_own else logits[:0])
        return torch.cat(found)

    def _logits(self, model: nn.Module, rows: slice, axes: OutputAxes) -> Tensor:
        """Return the outputs for some examples, [examples, …], in their own memory.

        Raises:
            InvalidInputError: If they have no row per example.
        """
        inputs, _ = self.probe.rows(rows, device_of(model))
        num_examples = rows.stop - rows.start
        path, logits = self._scores.of(call(model, inputs), num_examples)
        axis = axes.of(path, logits.shape, num_examples)
        if axis is None:
            raise InvalidInputError(
                f"the model's outputs {list(logits.shape)} have no row for each of the "
                f"{num_examples} examples"
            )
        # A model may return memory that it uses again in the next batch.
        return logits.movedim(axis, 0).clone()


def _recording(logits: Tensor) -> Recording:
    names = {1: (), 2: ("class",)}
    rest = names.get(logits.ndim, tuple(f"output_{axis}" for axis in range(1, logits.ndim)))
    return Recording([to_log_array(logits, "logits", ("example", *rest))])
