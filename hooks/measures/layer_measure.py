"""What the measures of layers share: their source, the layers, and the form kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from sonde.exceptions import InvalidInputError
from sonde.hooks.arguments import check_schedule, check_whole
from sonde.hooks.examples.probe import Probe
from sonde.hooks.model.layers import Selector, select_layers
from sonde.hooks.record import Subject
from sonde.hooks.schedule import Schedule
from sonde.hooks.stores.stores import Gram, Store
from sonde.hooks.training.source import Training, TrainingStep
from sonde.log import LogArray

from .base import Measure
from .live_outputs import LiveOutputs


class LayerMeasure(Measure):
    """A measure of layers, on a probe or of the training itself.

    Args:
        source: The examples: a `Probe`, what one takes, or `TRAINING`.
        layers: Globs, module types or predicates; None takes every module without children.
        store: The form kept: `Gram()`, `Sketch(dim)` or `Full()`.
        memory: How many bytes of features may be held.
        when: When it is due; None takes the recorder's schedule.

    Raises:
        InvalidInputError: If `memory`, `store` or `when` is none of these.
    """

    def __init__(
        self,
        source: Probe | Training | Any,
        layers: Selector | Sequence[Selector] | None = None,
        store: Store | None = None,
        *,
        memory: int = 1 << 30,
        when: Schedule | None = None,
    ) -> None:
        if isinstance(source, Training):
            self.training = source
        else:
            self.probe = source if isinstance(source, Probe) else Probe(source)
        check_whole("memory", memory, 1, note=", in bytes")
        check_schedule(when)
        if store is not None and not isinstance(store, Store):
            raise InvalidInputError(
                f"`store` (={store!r}) must be a store, such as sonde.Gram() or sonde.Full()"
            )
        self.layers = layers
        self.store = Gram() if store is None else store
        self.memory = memory
        self.when = when

    @property
    def source(self) -> str:
        """The name of the probe, or of the training."""
        if self.probe is None:
            return Training.name
        return self.probe.name or "probe"

    def check(self, model: nn.Module) -> None:
        """Refuse selectors that take no layer.

        Raises:
            LayerNotFoundError: If a selector takes nothing.
        """
        select_layers(model, self.layers)

    def table(self) -> Sequence[LogArray]:
        """Return the ids and targets of the probe; the training has others at each step."""
        return self.probe.table() if self.probe is not None else []

    def describe(self) -> dict[str, Any]:
        """Return what the run's description says of the measure."""
        store = self.store.describe()
        pool = store.get("pool")
        return {"store": store, "features": f"{pool} over positions" if pool else "flattened"}

    def _observe(self, subject: Subject, step: TrainingStep, *, of_gradients: bool) -> LiveOutputs:
        layers = select_layers(subject.model, self.layers)
        return LiveOutputs(step, layers, self.store, self.memory, of_gradients=of_gradients)
