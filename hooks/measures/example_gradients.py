"""Example gradients: the kernel of per-example loss gradients, in all and per layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from sonde.exceptions import InvalidInputError
from sonde.hooks.examplegrads import example_gradients
from sonde.hooks.losses import Loss
from sonde.hooks.probes import Probe
from sonde.hooks.schedule import Schedule
from sonde.hooks.select import Selector, layers_of, select_layers
from sonde.hooks.stores import to_log_array

from .base import ProbeMeasure, Recording, Subject


class ExampleGradients(ProbeMeasure):
    """Record the Gram matrix of per-example gradients on a probe, in eval mode.

    The gradient of one example is that of its own loss with respect to the trained parameters, not
    divided by the number of examples (Fort et al., 2019, 1901.09491, section 2). Recorded are the
    matrix of each layer and, as `gram_total`, their sum; parameters without a rule are not in it,
    and are named in the log and in one warning.

    Args:
        probe: The examples, with targets.
        loss: (outputs, targets) of a batch to a scalar, such as `F.cross_entropy`.
        layers: Only parameters of these layers; None takes all.
        per_layer: Record each layer's matrix too, not only the sum.
        when: When it is due; None takes the recorder's schedule.

    Raises:
        InvalidInputError: If the loss cannot be called, or the probe has no targets.
    """

    name = "example_gradients"

    def __init__(
        self,
        probe: Probe | Any,
        loss: Loss,
        layers: Selector | Sequence[Selector] | None = None,
        *,
        per_layer: bool = True,
        when: Schedule | None = None,
    ) -> None:
        super().__init__(probe, when=when)
        if not callable(loss):
            raise InvalidInputError(
                f"`loss` (={loss!r}) must be a function of (outputs, targets), "
                "such as torch.nn.functional.cross_entropy"
            )
        if self.probe.targets is None:
            raise InvalidInputError(
                "the probe of ExampleGradients has no targets; give Probe(inputs, targets)"
            )
        # What was found for a model is not checked again at its next record.
        self._verdicts: WeakKeyDictionary[nn.Module, dict[str, str]] = WeakKeyDictionary()
        self.loss = loss
        self.layers = layers
        self.per_layer = per_layer

    def check(self, model: nn.Module) -> None:
        """Refuse selectors that take no layer, and layers without trained parameters.

        Raises:
            LayerNotFoundError: If a selector takes nothing.
            InvalidInputError: If no selected parameter is trained.
        """
        if self.layers is None:
            parameters = list(model.parameters())
        else:
            selected = select_layers(model, self.layers).values()
            parameters = [p for m in selected for p in m.parameters(recurse=False)]
        if not any(parameter.requires_grad for parameter in parameters):
            raise InvalidInputError(
                "no selected layer owns a parameter that requires a gradient; "
                "select layers such as nn.Linear or nn.Conv2d, or leave `layers` out"
            )

    def describe(self) -> dict[str, Any]:
        """Return what the run's description says of the measure."""
        return {
            "loss": getattr(self.loss, "__name__", type(self.loss).__name__),
            "scale": "gradient of one example's loss, not divided by the number of examples",
        }

    def record_bytes(self, subject: Subject) -> int:
        """Estimate the bytes of one record, where every layer with parameters is covered."""
        layers = layers_of(subject.model)
        if self.layers is not None:
            layers = select_layers(subject.model, self.layers)
        trained = [
            layer
            for layer in layers.values()
            if any(p.requires_grad for p in layer.parameters(recurse=False))
        ]
        num_grams = 1 + len(trained) * self.per_layer
        return num_grams * self.probe.num_examples**2 * _dtype_of(subject.model).itemsize

    def record(self, subject: Subject) -> Recording:
        """Compute the matrices.

        Raises:
            InvalidInputError: If no parameter is covered.
        """
        grams = example_gradients(subject.model, self.loss, self.probe, layers=self.layers)
        missing = {
            name: coverage.removeprefix("unsupported: ")
            for name, coverage in grams.coverage.items()
            if coverage.startswith("unsupported")
        }
        if not grams.layers:
            raise InvalidInputError(f"no parameter has per-example gradients: {missing}")
        dims = ("example", "other_example")
        total = torch.stack(list(grams.layers.values())).sum(0)
        dtype = _dtype_of(subject.model)
        arrays = [to_log_array(total.to(dtype), "gram_total", dims)]
        if self.per_layer:
            arrays += [
                to_log_array(gram.to(dtype), "gram", dims, layer)
                for layer, gram in grams.layers.items()
            ]
        coverage = {"parameters": grams.coverage}
        return Recording(arrays, missing=missing, notes={"coverage": coverage})


def _dtype_of(model: nn.Module) -> torch.dtype:
    """Keep float64 for a float64 model, else float32."""
    is_double = any(parameter.dtype == torch.float64 for parameter in model.parameters())
    return torch.float64 if is_double else torch.float32
