"""Saturated examples of the training's own passes, as what comes back to the logits tells."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from sonde.hooks.examples.axes import ExampleAxes, OutputAxes
from sonde.hooks.losses.saturation import Logits, are_saturated
from sonde.hooks.training.micro_batches import MicroBatch

Guard: TypeAlias = Callable[[Callable[..., None]], Callable[..., None]]
"""Makes a hook of a function, of which nothing gets out."""

OWN = "the training's own"

_WARNING = (
    "examples are saturated: their loss is so small that float32 rounds the true class's part of "
    "their gradient, as softmax − one-hot, to 0. The training itself has these gradients; to have "
    "exact ones, record ExampleGradients of a Probe, whose loss is computed in float64"
)


class LiveSaturation:
    """Watches what comes back to the outputs of the training's passes in one step.

    Args:
        batch_dim: The axis of the model's inputs that holds the examples.
    """

    def __init__(self, batch_dim: int) -> None:
        self._axes = OutputAxes(ExampleAxes(batch_dim))
        self._sums: dict[MicroBatch, Tensor | None] = {}

    def watch(self, micro_batch: MicroBatch, outputs: Any, guard: Guard) -> None:
        """Wait for the gradients with respect to the logits of a pass."""
        logits = Logits(outputs, micro_batch.num_examples, self._axes)
        for at, edge in enumerate(logits.edges):
            hook = guard(partial(self._take, micro_batch, logits, at, edge.output_nr))
            edge.node.register_prehook(hook)

    def _take(
        self,
        micro_batch: MicroBatch,
        logits: Logits,
        at: int,
        position: int,
        gradients: Sequence[Tensor | None],
    ) -> None:
        gradient = gradients[position]
        if gradient is None:
            return
        sums, before = logits.half_sums(at, gradient), self._sums.get(micro_batch)
        if micro_batch in self._sums and (before is None or sums is None):
            sums = None
        elif before is not None and sums is not None:
            sums = sums + before
        self._sums[micro_batch] = sums

    def of(self, micro_batches: Sequence[MicroBatch]) -> Tensor | None:
        """Return which examples are saturated, [examples]; None if that is not known of each."""
        parts = []
        for one in micro_batches:
            sums, factor = self._sums.get(one), one.factor()
            if sums is None or factor is None:
                return None
            parts.append(are_saturated(sums.cpu().double() * float(factor)))
        return torch.cat(parts) if parts else None


def saturation_warnings(saturated: Tensor | None) -> Mapping[str, str]:
    """Return what is warned of, once, where examples of the training are saturated."""
    number = 0 if saturated is None else int(saturated.sum())
    if saturated is None or not number:
        return {}
    return {"saturated": f"{number} of {len(saturated)} {_WARNING}"}
