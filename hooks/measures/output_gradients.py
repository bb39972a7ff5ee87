"""Output gradients: those of the training's loss with respect to the outputs of layers."""

from __future__ import annotations

from torch import nn

from sonde.exceptions import InvalidInputError
from sonde.hooks.record import Subject
from sonde.hooks.training.source import TrainingStep

from .layer_measure import LayerMeasure
from .live_outputs import LiveOutputs


class OutputGradients(LayerMeasure):
    """Record the gradients that come back to the outputs of layers in the training's backward pass.

    Where `Recorder.batch` is given the loss, what it was multiplied with on the way is divided out
    again (the number of accumulated micro-batches, the scale of a GradScaler), and so is the number
    of examples of a mean: row i is then the gradient of the loss of example i alone. Without it the
    gradients are recorded as they came back, and the record says so.

    Args:
        source: `TRAINING`.
        layers: Globs, module types or predicates; None takes every module without children.
        store: The form kept: `Gram()`, `Sketch(dim)` or `Full()`.
        memory: How many bytes of features `Gram` may hold for micro-batches to come.
        when: When it is due; None takes the recorder's schedule.

    Raises:
        InvalidInputError: If `memory` is below 1.
    """

    name = "output_gradients"

    def check(self, model: nn.Module) -> None:
        """Refuse a probe, and selectors that take no layer.

        Raises:
            InvalidInputError: If its source is not the training.
            LayerNotFoundError: If a selector takes nothing.
        """
        if self.training is None:
            raise InvalidInputError(
                f"OutputGradients is of the training's own backward pass; give sonde.TRAINING, "
                f"not {self.probe!r}"
            )
        super().check(model)

    def observe(self, subject: Subject, step: TrainingStep) -> LiveOutputs:
        """Begin to take the gradients of the training's next backward passes."""
        return self._observe(subject, step, of_gradients=True)
