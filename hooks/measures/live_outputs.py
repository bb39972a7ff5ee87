"""Outputs of layers in the training's own passes, or the gradients that come back to them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sonde.exceptions import InvalidInputError
from sonde.hooks.examples.rows import OutputPlace
from sonde.hooks.model import own_work
from sonde.hooks.model.precision import full_precision
from sonde.hooks.model.taps import is_recomputing, tapped, tensor_leaves
from sonde.hooks.record import Observation, Recording
from sonde.hooks.stores.accumulators import Part
from sonde.hooks.stores.references import reference_attributes
from sonde.hooks.stores.stores import Store
from sonde.hooks.training.examples_in_band import (
    describe_examples,
    left_out,
    micro_batches_of,
    nothing_of,
)
from sonde.hooks.training.micro_batches import MicroBatch, Pass
from sonde.hooks.training.source import TrainingStep
from sonde.log import LogArray


@dataclass(frozen=True)
class _Key:
    """One tensor that a layer puts out in a forward pass."""

    layer: str
    call: int
    suffix: str

    @property
    def name(self) -> str:
        return f"{self.layer}#{self.call}{self.suffix}" if self.call else self.layer + self.suffix


class LiveOutputs(Observation):
    """Observes the outputs of layers in one step of the training.

    Args:
        step: The step.
        layers: The layers, by name.
        store: The form kept.
        memory: How many bytes of features may be held for micro-batches to come.
        of_gradients: Take the gradients with respect to the outputs, not the outputs.
    """

    def __init__(
        self,
        step: TrainingStep,
        layers: Mapping[str, nn.Module],
        store: Store,
        memory: int,
        *,
        of_gradients: bool,
    ) -> None:
        self._step = step
        self._layers = layers
        self._names = {module: name for name, module in layers.items()}
        self._store = store
        self._free_bytes = memory
        self._not_held: set[_Key] = set()
        self._of_gradients = of_gradients
        self._parts: dict[Pass, dict[_Key, Part]] = defaultdict(dict)
        self._first: dict[_Key, Part] = {}
        self._calls: dict[Pass, Counter[str]] = defaultdict(Counter)
        self._expected: dict[str, None] = {}
        self._missing: dict[str, str] = {}
        self._shapes: dict[_Key, list[int]] = {}
        self._recorded_shapes: dict[str, list[int]] = {}
        self._error: Exception | None = None
        step.axes.watch(layers)
        self._stack = ExitStack()
        self._stack.enter_context(tapped(layers, self._guarded(self._take_call)))

    def stop(self) -> None:
        """Leave the model as it was."""
        self._stack.close()

    def finish(self) -> Recording:
        """Return what was seen of the step.

        Raises:
            Exception: What went wrong in a hook, which never raises into the training.
        """
        micro_batches = micro_batches_of(self._step, self._error)
        if not micro_batches:
            return nothing_of(self._step)
        if self._step.axes.problem is not None:
            self._missing["(batch axis)"] = (
                "only axis 0 of an output is taken for the examples: the model cannot be run on "
                f"fewer of them to see, as {self._step.axes.problem}"
            )
        arrays = self._arrays(micro_batches)
        for name in self._layers:
            if not any(calls[name] for calls in self._calls.values()):
                self._missing[name] = "it was never called in the forward pass"
        examples, attributes = describe_examples(micro_batches, of_gradients=self._of_gradients)
        counts, missing = left_out(self._step)
        attributes |= counts
        self._missing |= missing
        sizes = self._store.block_sizes([micro_batch.num_examples for micro_batch in micro_batches])
        if sizes is not None:
            attributes["block_sizes"] = sizes
        attributes |= reference_attributes(arrays)
        return Recording(
            [*examples, *arrays] if arrays else [],
            attributes,
            self._missing,
            {"layers": {"feature_shapes": self._recorded_shapes}},
        )

    def _arrays(self, micro_batches: list[MicroBatch]) -> list[LogArray]:
        parts: dict[str, list[Part]] = defaultdict(list)
        shapes: dict[str, list[int]] = {}
        for micro_batch in micro_batches:
            seen: Counter[str] = Counter()
            for one in micro_batch.passes:
                if one.has_gradients:
                    for key, part in self._parts[one].items():
                        numbered = _Key(key.layer, key.call + seen[key.layer], key.suffix)
                        parts[numbered.name].append(part)
                        shapes[numbered.name] = self._shapes[key]
                    seen += self._calls[one]
        arrays = []
        for name, found in parts.items():
            if name in self._missing:
                continue
            if len(found) != len(micro_batches):
                reason = f"it was seen in {len(found)} of {len(micro_batches)} micro-batches"
                self._missing[name] = reason
                continue
            try:
                with full_precision():
                    arrays += self._store.join(found, name)
                self._recorded_shapes[name] = shapes[name]
            except InvalidInputError as error:
                self._missing[name] = str(error)
        for name in self._expected:
            if name not in parts and name not in self._missing:
                self._missing[name] = "no gradient came back to it"
        return arrays

    def _guarded(self, function: Callable[..., None]) -> Callable[..., None]:
        """Let nothing out of a hook, neither a value nor an exception."""

        def call(*args: Any) -> None:
            if self._error is None and self._step.observes():
                try:
                    function(*args)
                except Exception as error:
                    self._error = error
                    self._parts.clear()

        return call

    def _take_call(self, _: str, module: nn.Module, first: Any, output: Any) -> None:
        layer = self._names[module]
        if is_recomputing():
            self._take_recomputed(layer, output)
            return
        one = self._step.forward_pass(first)
        if one is None:
            return
        call = self._calls[one][layer]
        self._calls[one][layer] += 1
        leaves = tensor_leaves(output)
        if not leaves:
            kind = type(output).__name__
            self._missing[_Key(layer, call, "").name] = f"its output ({kind}) holds no tensor"
        for suffix, tensor in leaves:
            self._take(one, _Key(layer, call, suffix), tensor)

    def _take_recomputed(self, layer: str, output: Any) -> None:
        """Take the output that a reentrant checkpoint computes again, as the first had no graph."""
        if not self._of_gradients:
            return
        one = self._step.recomputed_pass()
        calls = None if one is None else self._calls[one][layer]
        for suffix, tensor in tensor_leaves(output):
            if one is not None and calls == 1:
                key = _Key(layer, 0, suffix)
                if key.name in self._expected and tensor.requires_grad:
                    self._take(one, key, tensor)
            elif tensor.requires_grad and layer + suffix in self._expected:
                self._missing[layer + suffix] = (
                    "its calls cannot be told apart when a checkpoint repeats them"
                )

    def _take(self, one: Pass, key: _Key, tensor: Tensor) -> None:
        name = key.name
        is_transformed = torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        if tensor.requires_grad and not is_transformed:
            tensor.register_hook(one.confirm)  # The pass counts, whatever is kept of this output.
        if name in self._missing:
            return
        if is_transformed:
            self._missing[name] = "it was called inside a transform of torch.func"
            return
        if tensor.is_nested or not tensor.is_floating_point():
            kind = "a nested tensor" if tensor.is_nested else f"{tensor.dtype}, not floating point"
            self._missing[name] = f"its output is {kind}"
            return
        size = one.micro_batch.size
        if size is None:
            self._missing[name] = (
                f"it is not known how many examples its output {list(tensor.shape)} has"
            )
            return
        place = self._step.axes.place(name, tensor.shape, size)
        if isinstance(place, str):
            self._missing[name] = place
            return
        self._shapes[key] = place.feature_shape(tensor.shape)
        if self._of_gradients:
            self._expected[name] = None
            if tensor.requires_grad:
                take = self._guarded(partial(self._take_gradient, one, key, place, size))
                tensor.register_hook(take)
        else:
            self._add(one, key, place.features(tensor, size))

    def _take_gradient(
        self, one: Pass, key: _Key, place: OutputPlace, size: int, gradient: Tensor | None
    ) -> None:
        # One of ours may pass what a layer made of parameters alone.
        if gradient is None or own_work.depth():
            return
        if key in self._parts[one]:
            self._missing[key.name] = "gradients came back to it more than once in a step"
            return
        factor = one.micro_batch.factor()
        features = place.features(gradient.detach(), size)
        if factor is not None:
            wide = features.dtype if features.dtype == torch.float64 else torch.float32
            features = features.to(wide) * factor
        self._add(one, key, features)

    def _add(self, one: Pass, key: _Key, features: Tensor) -> None:
        num_bytes = self._store.held_bytes(features[:1].numel(), features.dtype) * len(features)
        if num_bytes > self._free_bytes:
            self._let_go(key)
            self._not_held.add(key)
        is_held = num_bytes > 0 and key not in self._not_held
        self._free_bytes -= num_bytes * is_held
        # The training's autocast would multiply in half precision.
        with torch.autocast(features.device.type, enabled=False), full_precision():
            first = self._first.get(key)
            part = self._store.part(features.detach(), is_held=is_held, first=first)
        # Its values are not kept twice: what the others need of it is what was subtracted.
        self._first.setdefault(key, Part(part.values[:0], reference=part.reference))
        self._parts[one][key] = part

    def _let_go(self, key: _Key) -> None:
        """Free what is held of a layer that cannot be joined any more."""
        for parts in self._parts.values():
            if key in parts and parts[key].features is not None:
                self._free_bytes += parts[key].num_bytes
                parts[key] = replace(parts[key], features=None)
