"""Activations: the outputs of layers on a probe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from sonde.hooks.probes import Probe, call, device_of, undisturbed
from sonde.hooks.schedule import Schedule
from sonde.hooks.select import Selector, select_layers
from sonde.hooks.stores import Accumulator, Gram, Store
from sonde.hooks.taps import tapped, tensor_leaves

from .base import ProbeMeasure, Recording, Subject


class Activations(ProbeMeasure):
    """Record layer outputs on a probe, in eval mode.

    Feature maps are flattened: every layer is an examples × features matrix. A layer called again
    in one forward pass is recorded as `name#1`; of an output with several tensors each is recorded,
    as `name[0]`, `name[1]`, ….

    Args:
        probe: The examples.
        layers: Globs, module types or predicates; None takes every module without children.
        store: The form kept: `Gram()`, `Sketch(dim)` or `Full()`.
        when: When it is due; None takes the recorder's schedule.
    """

    name = "activations"

    def __init__(
        self,
        probe: Probe | Any,
        layers: Selector | Sequence[Selector] | None = None,
        store: Store | None = None,
        *,
        when: Schedule | None = None,
    ) -> None:
        super().__init__(probe, when=when)
        self.layers = layers
        self.store = Gram() if store is None else store
        self._batched: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()

    def check(self, model: nn.Module) -> None:
        """Refuse selectors that take no layer.

        Raises:
            LayerNotFoundError: If a selector takes nothing.
        """
        select_layers(model, self.layers)

    def describe(self) -> dict[str, Any]:
        """Return what the run's description says of the measure."""
        store = self.store.describe()
        pool = store.get("pool")
        return {"store": store, "features": f"{pool} over positions" if pool else "flattened"}

    def record(self, subject: Subject) -> Recording:
        """Run the probe forward and keep what the store keeps of each layer."""
        selected = select_layers(subject.model, self.layers)
        with undisturbed(subject.model), torch.no_grad():
            if subject.model not in self._batched:
                self._batched[subject.model] = self._find_batched(subject.model, selected)
            passes = _Passes(self.store, self.probe.num_examples, self._batched[subject.model])
            for inputs, _ in self.probe.batches(device_of(subject.model)):
                passes.start_batch(min(self.probe.batch_size, self.probe.num_examples))
                with tapped(selected, passes.on_call):
                    call(subject.model, inputs)
        return passes.recording(selected)

    def _find_batched(self, model: nn.Module, selected: dict[str, nn.Module]) -> set[str]:
        """Return the outputs whose axis 0 is the batch: that has as many rows as a small batch.

        In a full batch another axis may have the same size by chance, such as the time steps.
        """
        full = min(self.probe.batch_size, self.probe.num_examples)
        num_rows = 2 if full > 2 else 1
        batched: set[str] = set()

        def on_call(name: str, _: nn.Module, __: Any, output: Any) -> None:
            for suffix, tensor in tensor_leaves(output):
                if not tensor.is_nested and tensor.ndim and len(tensor) == num_rows:
                    batched.add(f"{name}{suffix}")

        inputs, _ = self.probe.rows(slice(0, num_rows), device_of(model))
        with tapped(selected, on_call):
            call(model, inputs)
        return batched


class _Passes:
    """Collects the outputs of layers over the batches of a probe."""

    def __init__(self, store: Store, num_examples: int, batched: set[str]) -> None:
        self._batched = batched
        self._store = store
        self._num_examples = num_examples
        self._accumulators: dict[str, Accumulator] = {}
        self._counts: dict[str, int] = {}
        self._shapes: dict[str, list[int]] = {}
        self._missing: dict[str, str] = {}
        self._called: set[nn.Module] = set()
        self._done = 0
        self._batch = 0

    def start_batch(self, batch_size: int) -> None:
        """Start the next batch of the probe."""
        self._done += self._batch
        self._batch = min(batch_size, self._num_examples - self._done)

    def on_call(self, name: str, module: nn.Module, _: Any, output: Any) -> None:
        """Take one output of a layer."""
        self._called.add(module)
        leaves = tensor_leaves(output)
        if not leaves:
            self._missing[name] = f"its output ({type(output).__name__}) holds no tensor"
        for suffix, tensor in leaves:
            self._add(f"{name}{suffix}", tensor)

    def recording(self, selected: dict[str, nn.Module]) -> Recording:
        """Return what was collected, and which layers are missing."""
        arrays = []
        for name, accumulator in self._accumulators.items():
            if name in self._missing:
                continue
            if self._counts[name] != self._num_examples:
                self._missing[name] = (
                    f"it saw {self._counts[name]} of {self._num_examples} examples"
                )
                continue
            arrays.append(accumulator.result(name))
        for name, module in selected.items():
            if module not in self._called:
                self._missing[name] = "it was never called in the forward pass"
        shapes = {
            array.layer: self._shapes[array.layer] for array in arrays if array.layer is not None
        }
        return Recording(
            arrays, missing=self._missing, notes={"layers": {"feature_shapes": shapes}}
        )

    def _add(self, name: str, tensor: Tensor) -> None:
        if name in self._missing:
            return
        if tensor.is_nested:
            self._missing[name] = "its output is a nested tensor"
            return
        if tensor.ndim == 0 or len(tensor) != self._batch or name not in self._batched:
            self._missing[name] = (
                f"axis 0 of its output {list(tensor.shape)} is not the batch of {self._batch}"
            )
            self._accumulators.pop(name, None)
            return
        if not tensor.is_floating_point():
            self._missing[name] = f"its output is {tensor.dtype}, not floating point"
            return
        if name not in self._accumulators:
            self._accumulators[name] = self._store.accumulator(self._num_examples)
            self._counts[name] = 0
            self._shapes[name] = list(tensor.shape[1:])
        self._accumulators[name].add(tensor)
        self._counts[name] += len(tensor)
