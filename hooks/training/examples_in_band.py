"""The examples of a record in band: their ids and targets, and the scale of their gradients."""

from __future__ import annotations

from typing import Any

import numpy as np

from sonde.hooks.record import Recording
from sonde.log import LogArray

from .micro_batches import MicroBatch
from .source import TrainingStep

_NOTHING_COUNTS = "no pass counted, as their gradients were gone at the step"
_NOTHING_SEEN = "no gradient came back to a forward pass between this step and the next"


def micro_batches_of(step: TrainingStep, error: Exception | None) -> list[MicroBatch]:
    """Return the micro-batches of a step that is over; none where nothing can be recorded of it.

    Args:
        step: The step.
        error: What went wrong in a hook of the observation.

    Raises:
        Exception: What went wrong, in the observation or in what follows the step.
    """
    error = error or step.error
    if error is not None:
        raise error
    return [] if step.mismatch is not None else step.micro_batches


def nothing_of(step: TrainingStep) -> Recording:
    """Return what is recorded of a step without micro-batches: why there is nothing."""
    empty = "its batches had no example" if step.num_empty_passes else None
    gone = _NOTHING_COUNTS if step.dropped else None
    return Recording(missing={"(model)": step.mismatch or gone or empty or _NOTHING_SEEN})


def left_out(step: TrainingStep) -> tuple[dict[str, Any], dict[str, str]]:
    """Return how many passes a record leaves out, and of what kind that is not expected."""
    counts = {
        "late_passes": step.num_late_passes,
        "empty_passes": step.num_empty_passes,
        "dropped": dict(step.dropped),
    }
    missing = {}
    if step.num_empty_passes:
        missing["(empty batches)"] = "passes over batches without any example are left out"
    return {kind: count for kind, count in counts.items() if count}, missing


def describe_examples(
    micro_batches: list[MicroBatch], *, of_gradients: bool
) -> tuple[list[LogArray], dict[str, Any]]:
    """Return which examples a record is of, and what is known of them.

    Args:
        micro_batches: The micro-batches of the step.
        of_gradients: The record is of gradients, whose scale depends on the loss.
    """
    batches = [micro_batch.batch for micro_batch in micro_batches]
    ids = [batch.ids for batch in batches if batch is not None and batch.ids is not None]
    targets = [b.targets for b in batches if b is not None and b.targets is not None]
    arrays = []
    if len(ids) == len(micro_batches):
        arrays.append(LogArray("id", np.concatenate(ids), ("example",)))
    if len(targets) == len(micro_batches) and len({t.shape[1:] for t in targets}) == 1:
        values = np.concatenate(targets)
        dims = ("example", *(f"target_{axis}" for axis in range(1, values.ndim)))
        arrays.append(LogArray("target", values, dims))
    arrays += _duplicates(micro_batches)
    attributes: dict[str, Any] = {
        "micro_batches": [micro_batch.num_examples for micro_batch in micro_batches],
        "ids": "given" if len(ids) == len(micro_batches) else "unknown: in order of arrival",
    }
    if of_gradients:
        factors = [micro_batch.factor() for micro_batch in micro_batches]
        known = [float(factor) for factor in factors if factor is not None]
        attributes["scale"] = _scale_of(micro_batches, is_known=len(known) == len(factors))
        attributes["factors"] = known
    return arrays, attributes


def _scale_of(micro_batches: list[MicroBatch], *, is_known: bool) -> str:
    """Return what a row is, in words.

    Where the loss divides by labelled tokens, class weights or a mask, or couples the examples, its
    contribution to the gradient of the batch is all that a row is known to be.
    """
    if not is_known:
        return "unknown: as it came back; give recorder.batch(loss=…)"
    batches = [one.batch for one in micro_batches if one.batch is not None]
    if all(batch.is_of_examples for batch in batches):
        return "gradient of one example's loss, not divided by the number of examples"
    times = ", × n, its number of examples" if batches[0].reduction == "mean" else ""
    return (
        f"contribution to the batch's loss{times}; the loss is not shown to be the "
        f"{batches[0].reduction} of the examples' own losses"
    )


def _duplicates(micro_batches: list[MicroBatch]) -> list[LogArray]:
    """Return which examples only fill up a batch, where that was told of any micro-batch."""
    sizes = [micro_batch.num_examples for micro_batch in micro_batches]
    told = [None if one.batch is None else one.batch.num_real for one in micro_batches]
    if all(num_real is None for num_real in told):
        return []
    masks = [
        np.arange(size) >= (size if num_real is None else num_real)
        for size, num_real in zip(sizes, told, strict=True)
    ]
    return [LogArray("is_duplicate", np.concatenate(masks), ("example",))]
