"""Small runs: what a model puts out for a few examples, which shows where the examples are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from sonde.hooks.model.taps import tapped, tensor_leaves
from sonde.hooks.stores.stores import Store

from .axes import Seen, batch_axis, is_ambiguous
from .probe import Probe, call, device_of

_runs: WeakKeyDictionary[nn.Module, WeakKeyDictionary[Probe, SmallRun | None]] = WeakKeyDictionary()


@dataclass
class SmallRun:
    """The outputs of layers, and of the model itself, for a few examples.

    Attributes:
        num_examples: Their number.
        device: Where they are.
        shapes: The shapes of layers' outputs, by name.
        root: The shapes of what the model itself returns, by the path to each.
        dtypes: The types of layers' outputs.
        other: The same for another number of examples, where it takes two to see the axes.
    """

    num_examples: int
    device: torch.device
    shapes: dict[str, torch.Size] = field(default_factory=dict)
    root: dict[str, torch.Size] = field(default_factory=dict)
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    other: SmallRun | None = None

    def has_ambiguous(self) -> bool:
        """Return whether several axes of an output have the number of examples."""
        shapes = [*self.shapes.values(), *self.root.values()]
        return any(is_ambiguous(shape, self.num_examples) for shape in shapes)

    def seen(self, name: str) -> list[Seen]:
        """Return the shapes of a layer's output."""
        runs = [self] if self.other is None else [self, self.other]
        return [(run.num_examples, run.shapes[name]) for run in runs if name in run.shapes]

    def seen_of_model(self, path: str) -> list[Seen]:
        """Return the shapes of an output of the model itself."""
        runs = [self] if self.other is None else [self, self.other]
        return [(run.num_examples, run.root[path]) for run in runs if path in run.root]

    def kept_bytes(self, store: Store, num_examples: int) -> dict[str, int]:
        """Return what the store keeps of each output of so many examples, in bytes."""
        return {
            name: store.kept_bytes(num_examples, none.shape[1:], none.dtype)
            for name, none in self.none.items()
        }

    @cached_property
    def none(self) -> dict[str, Tensor]:
        """Each output that has an axis of examples, for no example at all."""
        found = {}
        for name, shape in self.shapes.items():
            axis = batch_axis(shape, self.num_examples, *self.seen(name))
            if axis is None and self.other is None and self.num_examples in shape:
                axis = shape.index(self.num_examples)  # A full batch will tell.
            if axis is not None and self.dtypes[name].is_floating_point:
                rest = [*shape[:axis], *shape[axis + 1 :]]
                found[name] = torch.empty(0, *rest, dtype=self.dtypes[name], device=self.device)
        return found

    def held_bytes(self, store: Store) -> dict[str, int]:
        """Return what the store holds of an example of each output, in bytes."""
        return {
            name: store.held_bytes(none.shape[1:].numel(), none.dtype)
            for name, none in self.none.items()
        }


def run_small(
    model: nn.Module, probe: Probe, num_examples: int, layers: Mapping[str, nn.Module]
) -> SmallRun:
    """Run a model on the first examples of a probe; once more, with another number, if it needs to.

    Args:
        model: The model, in a state in which nothing is disturbed.
        probe: The examples.
        num_examples: How many.
        layers: The layers to look at, by name.
    """
    run = _run(model, probe, num_examples, layers)
    if num_examples < probe.num_examples and run.has_ambiguous():
        run.other = _run(model, probe, num_examples + 1, layers)
    return run


def seen_by(model: nn.Module, probe: Probe) -> Callable[[str], list[Seen]]:
    """Return what tells the shapes of a model's outputs for a few examples of a probe.

    The model is run once it is asked, and once only for each probe.

    Args:
        model: The model, in a state in which nothing is disturbed while it is asked.
        probe: The examples.
    """
    runs = _runs.setdefault(model, WeakKeyDictionary())

    def seen(path: str) -> list[Seen]:
        if probe not in runs:
            number = 2 if min(probe.batch_size, probe.num_examples) > 2 else 1
            try:
                runs[probe] = run_small(model, probe, number, {})
            except Exception:  # Not every model can be run on fewer examples.
                runs[probe] = None
        run = runs[probe]
        return [] if run is None else run.seen_of_model(path)

    return seen


def _run(
    model: nn.Module, probe: Probe, num_examples: int, layers: Mapping[str, nn.Module]
) -> SmallRun:
    run = SmallRun(num_examples, device_of(model))

    def on_call(name: str, _: nn.Module, __: object, output: object) -> None:
        for suffix, tensor in tensor_leaves(output):
            if not tensor.is_nested:
                run.shapes[f"{name}{suffix}"] = tensor.shape
                run.dtypes[f"{name}{suffix}"] = tensor.dtype

    inputs, _ = probe.rows(slice(0, num_examples), run.device)
    with torch.no_grad(), tapped(layers, on_call):
        output = call(model, inputs)
    run.root = {path: x.shape for path, x in tensor_leaves(output) if not x.is_nested}
    return run
