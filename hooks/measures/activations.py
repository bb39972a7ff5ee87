"""Activations: the outputs of layers on a probe."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from sonde.exceptions import InvalidInputError
from sonde.hooks.passes import Pass, plan_passes
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
        memory: How many bytes of features `Gram` may hold. With more examples than the probe's
            `batch_size` it needs those of earlier batches again; what does not fit is held in
            another pass over the probe.
        when: When it is due; None takes the recorder's schedule.

    Raises:
        InvalidInputError: If `memory` is below 1.
    """

    name = "activations"

    def __init__(
        self,
        probe: Probe | Any,
        layers: Selector | Sequence[Selector] | None = None,
        store: Store | None = None,
        *,
        memory: int = 1 << 30,
        when: Schedule | None = None,
    ) -> None:
        super().__init__(probe, when=when)
        if memory < 1:
            raise InvalidInputError(f"`memory` (={memory}) must be >= 1, in bytes")
        self.layers = layers
        self.store = Gram() if store is None else store
        self.memory = memory
        self._held_bytes: WeakKeyDictionary[nn.Module, dict[str, int]] = WeakKeyDictionary()

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
        model, probe = subject.model, self.probe
        with undisturbed(model), torch.no_grad():
            if model not in self._held_bytes:
                self._held_bytes[model] = self._find_batched(model, selected)
            starts = range(0, probe.num_examples, probe.batch_size)
            sizes = [min(probe.batch_size, probe.num_examples - start) for start in starts]
            outputs = _Outputs(self.store, probe.num_examples, set(self._held_bytes[model]))
            for held in plan_passes(self._held_bytes[model], sizes, self.memory):
                first = min((batches.start for batches in held.values()), default=0)
                outputs.start_pass(held, starts[first])
                for batch in range(first, len(starts)):
                    outputs.start_batch(batch, sizes[batch])
                    rows = slice(starts[batch], starts[batch] + sizes[batch])
                    with tapped(selected, outputs.on_call):
                        call(model, probe.rows(rows, device_of(model))[0])
        return outputs.recording(selected)

    def _find_batched(self, model: nn.Module, selected: dict[str, nn.Module]) -> dict[str, int]:
        """Find the outputs whose axis 0 is the batch: that has as many rows as a small batch.

        In a full batch another axis may have the same size by chance, such as the time steps.

        Returns:
            What the store holds of an example of each, in bytes.
        """
        full = min(self.probe.batch_size, self.probe.num_examples)
        num_rows = 2 if full > 2 else 1
        held_bytes: dict[str, int] = {}

        def on_call(name: str, _: nn.Module, __: Any, output: Any) -> None:
            for suffix, tensor in tensor_leaves(output):
                if not tensor.is_nested and tensor.ndim and len(tensor) == num_rows:
                    num_features = tensor.numel() // num_rows
                    size = self.store.held_bytes(num_features, tensor.dtype)
                    held_bytes[f"{name}{suffix}"] = size

        inputs, _ = self.probe.rows(slice(0, num_rows), device_of(model))
        with tapped(selected, on_call):
            call(model, inputs)
        return held_bytes


class _Outputs:
    """Collects the outputs of layers over the batches of a probe, in one pass or several."""

    def __init__(self, store: Store, num_examples: int, known: set[str]) -> None:
        self._store = store
        self._num_examples = num_examples
        self._known = known
        self._held: Pass = {}
        self._accumulators: dict[str, Accumulator] = {}
        self._counts: Counter[str] = Counter()
        self._shapes: dict[str, list[int]] = {}
        self._missing: dict[str, str] = {}
        self._called: set[nn.Module] = set()

    def start_pass(self, held: Pass, first: int) -> None:
        """Start a pass that holds these batches of these outputs, and begins at an example."""
        self._held = held
        self._first = first
        for accumulator in self._accumulators.values():
            accumulator.start(first)

    def start_batch(self, number: int, size: int) -> None:
        """Start a batch of the probe."""
        self._batch = number
        self._size = size

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
        if tensor.ndim == 0 or len(tensor) != self._size or name not in self._known:
            self._missing[name] = (
                f"axis 0 of its output {list(tensor.shape)} is not the batch of {self._size}"
            )
            self._accumulators.pop(name, None)
            return
        if not tensor.is_floating_point():
            self._missing[name] = f"its output is {tensor.dtype}, not floating point"
            return
        if name not in self._held:
            return  # It is the turn of others.
        if name not in self._accumulators:
            self._accumulators[name] = self._store.accumulator(self._num_examples)
            self._accumulators[name].start(self._first)
            self._shapes[name] = list(tensor.shape[1:])
        is_held = self._batch in self._held[name]
        self._accumulators[name].add(tensor, is_held=is_held)
        self._counts[name] += len(tensor) * is_held
