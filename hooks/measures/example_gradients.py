"""Example gradients: the kernel of per-example loss gradients, in all and per layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from sonde.exceptions import InvalidInputError
from sonde.hooks.examples.probe import Probe
from sonde.hooks.gradients.compute import check_store, example_gradients
from sonde.hooks.gradients.live import LiveGradients
from sonde.hooks.gradients.recorded import dtype_of, gradient_arrays
from sonde.hooks.gradients.uses.parameters import UNSUPPORTED, OwnedParameter, owned_parameters
from sonde.hooks.losses.per_example import Loss
from sonde.hooks.losses.saturation import head_attributes
from sonde.hooks.model.layers import Selector, select_layers
from sonde.hooks.record import Recording, Subject
from sonde.hooks.schedule import Schedule
from sonde.hooks.stores.stores import Full, Store
from sonde.hooks.training.source import Training, TrainingStep

from .layer_measure import LayerMeasure


class ExampleGradients(LayerMeasure):
    """Record per-example gradients: on a probe, in eval mode, or those of the training itself.

    The gradient of one example is that of its own loss with respect to the trained parameters, not
    divided by the number of examples (Fort et al., 2019, 1901.09491, section 2). Recorded are what
    the store keeps of each layer and, as `gram_total` or `sketch_total`, of their sum, and norms
    of gradients. How each parameter is covered stands in the log: `exact`, `fallback` (to
    torch.func, or to one example after the other), `frozen`, or `unsupported`; what is unsupported
    is named in one warning, too.

    On a probe the loss sees the model's outputs in float64, as does what ends the model, such as
    log-softmax. In float32 softmax − one-hot rounds the true class's entry to 0 where the model is
    sure of an example, and its gradient keeps a third of its direction. The study very probably
    computed in float32, so that its late stiffness has this rounding in it. Each record says which
    examples float32 would have rounded, `is_saturated`, and in its attributes how many these are,
    how many gradients are zero, and the precision of the `head`. The training's own passes are
    recorded as they are, in its own precision; there the first saturated example is warned of.

    `ExampleGradients(TRAINING)` takes them from the training's own passes, of every micro-batch
    between a due step and the next one, at no extra pass. `Recorder.batch` gives the loss, whose
    scale is divided out, and the ids. The sum over examples is held against the gradient of each
    parameter as it arrives, before it is accumulated or clipped: `sum_check` in the record. Where
    BatchNorm couples examples, a row is the contribution of its example, and the record says so.
    A row is the gradient of its example's own loss, as on a probe, only where the graph of the loss
    shows that: a plain cross entropy, squared error or the like, right at the outputs. A loss that
    class weights, ignored targets or masks divide, or that couples the examples, gives rows that
    are contributions to the batch's loss, times n if it is a mean; `scale` in the record says so.

    Args:
        source: The examples: a `Probe`, what one takes, or `TRAINING`.
        loss: (outputs, targets) of a batch to a scalar, such as `F.cross_entropy`; None where the
            model returns its loss, and for the training, which has its own.
        layers: Only parameters of these layers; None takes all.
        store: The form kept: `Gram()`, `Sketch(dim)` or `Full()`.
        per_layer: Record each layer's matrix too, not only the sum.
        memory: How many bytes of all examples' gradients `Gram` may hold. Where a probe needs more,
            another pass is run over it. A training's passes cannot be run again, so there a
            parameter that needs more is left out of steps with several micro-batches.
        when: When it is due; None takes the recorder's schedule.

    Raises:
        InvalidInputError: If the arguments do not fit together.
    """

    name = "example_gradients"

    def __init__(
        self,
        source: Probe | Training | Any,
        loss: Loss | None = None,
        layers: Selector | Sequence[Selector] | None = None,
        store: Store | None = None,
        *,
        per_layer: bool = True,
        memory: int = 1 << 30,
        when: Schedule | None = None,
    ) -> None:
        super().__init__(source, layers, store, memory=memory, when=when)
        self._kept_by = check_store(self.store)
        if loss is not None and not callable(loss):
            raise InvalidInputError(
                f"`loss` (={loss!r}) must be a function of (outputs, targets), "
                "such as torch.nn.functional.cross_entropy"
            )
        if loss is not None and self.training is not None:
            raise InvalidInputError(
                "the training computes its own loss; leave `loss` out, and pass that loss to "
                "recorder.batch(loss=…)"
            )
        if self.probe is not None and self.probe.targets is None and loss is not None:
            raise InvalidInputError(
                "the probe of ExampleGradients has no targets; give Probe(inputs, targets)"
            )
        self.loss = loss
        self.per_layer = per_layer

    def check(self, model: nn.Module) -> None:
        """Refuse selectors that take no layer, and layers without trained parameters.

        Raises:
            LayerNotFoundError: If a selector takes nothing.
            InvalidInputError: If no selected parameter is trained.
        """
        if not any(parameter.tensor.requires_grad for parameter in self._parameters(model)):
            raise InvalidInputError(
                "no selected layer owns a parameter that requires a gradient; "
                "select layers such as nn.Linear or nn.Conv2d, or leave `layers` out"
            )

    def describe(self) -> dict[str, Any]:
        """Return what the run's description says of the measure."""
        loss = "its own" if self.loss is None else getattr(self.loss, "__name__", None)
        return {
            "store": self.store.describe(),
            "loss": loss or type(self.loss).__name__,
            "scale": "gradient of one example's loss, not divided by the number of examples",
        }

    def record_bytes(self, subject: Subject) -> int | None:
        """Estimate the bytes of one record on a probe, where every parameter is covered."""
        if self.probe is None:
            return None
        n = self.probe.num_examples
        trained = [p for p in self._parameters(subject.model) if p.tensor.requires_grad]
        dtype = dtype_of(subject.model)
        if isinstance(self._kept_by, Full):
            kept_dtype = self._kept_by.dtype or dtype
            kept = n * sum(p.tensor.numel() for p in trained) * kept_dtype.itemsize
        else:
            num_layers = 1 + len({p.layer for p in trained}) * self.per_layer
            kept = num_layers * self.store.kept_bytes(n, (), dtype)
        num_norms = 1 + len({p.layer for p in trained}) * self.per_layer
        return kept + num_norms * n * 8 + n  # The last are of `is_saturated`.

    def record(self, subject: Subject) -> Recording:
        """Compute the gradients of the probe.

        Raises:
            InvalidInputError: If no parameter is covered.
        """
        assert self.probe is not None  # Of the training it is observed.
        result = example_gradients(
            subject.model,
            self.loss,
            self.probe,
            store=self.store,
            layers=self.layers,
            memory=self.memory,
        )
        missing = {
            name: coverage.removeprefix(UNSUPPORTED)
            for name, coverage in result.coverage.items()
            if coverage.startswith(UNSUPPORTED)
        }
        if not result.layer_norms:
            raise InvalidInputError(f"no parameter has per-example gradients: {missing}")
        head = head_attributes(result.head, result.saturated, result.norms)
        dtype = dtype_of(subject.model)
        arrays = gradient_arrays(result, self._kept_by, dtype, per_layer=self.per_layer)
        return Recording(arrays, head, missing, {"coverage": {"parameters": result.coverage}})

    def observe(self, subject: Subject, step: TrainingStep) -> LiveGradients:
        """Begin to take the gradients of the training's next passes."""
        parameters = self._parameters(subject.model)
        return LiveGradients(
            step, subject.model, parameters, self._kept_by, self.memory, per_layer=self.per_layer
        )

    def _parameters(self, model: nn.Module) -> list[OwnedParameter]:
        selected = None if self.layers is None else select_layers(model, self.layers)
        return owned_parameters(model, selected)
