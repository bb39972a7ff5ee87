"""Small runs: what a model puts out for a few examples, which shows where the examples are."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from sonde.hooks.model.random_states import RandomStates
from sonde.hooks.model.taps import tapped, tensor_leaves
from sonde.hooks.model.value_orders import ValueOrders
from sonde.hooks.stores.stores import Store

from .axes import Seen, is_ambiguous
from .probe import Probe, arguments_of, device_of
from .rows import (
    NUM_COMPARED,
    FewExamples,
    OutputPlace,
    Unknown,
    changed_rows,
    exchanges,
    grows,
    may_have_rows,
    place_of,
    rows_in,
)

RunOn: TypeAlias = Callable[[Any], Any]
"""Calls a model with what `FewExamples` returns."""

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
        rows: Where the rows of examples are in outputs whose first axis holds several of each.
        values: The values of some outputs.
    """

    num_examples: int
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    shapes: dict[str, torch.Size] = field(default_factory=dict)
    root: dict[str, torch.Size] = field(default_factory=dict)
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    other: SmallRun | None = None
    rows: dict[str, OutputPlace | Unknown] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)

    @property
    def is_settled(self) -> bool:
        """Whether another look would show no more of the rows of examples."""
        return all(isinstance(of, OutputPlace) or of.is_final for of in self.rows.values())

    def place(self, name: str, shape: Sequence[int], size: int) -> OutputPlace | str:
        """Return where the examples are in a layer's output, or why that is not known.

        Args:
            name: The name of the output.
            shape: Its shape for `size` examples.
            size: The number of examples.
        """
        return place_of(shape, size, self.seen(name), self.rows.get(name))

    def doubtful(self) -> list[str]:
        """Return the outputs whose first axis may hold several rows of each example."""
        return [
            name
            for name, shape in self.shapes.items()
            if may_have_rows(shape, self.num_examples) and self.dtypes[name].is_floating_point
        ]

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
            place = self.place(name, shape, self.num_examples)
            if isinstance(place, str) and self.other is None and self.num_examples in shape:
                place = OutputPlace(shape.index(self.num_examples))  # A full batch will tell.
            if isinstance(place, OutputPlace) and self.dtypes[name].is_floating_point:
                rest = place.feature_shape(shape)
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
    device = device_of(model)

    def first(size: int) -> FewExamples:
        return FewExamples(probe.rows(slice(0, size), device)[0], probe.axes.of)

    def run_on(inputs: Any) -> Any:
        args, kwargs = arguments_of(inputs)
        return model(*args, **kwargs)

    run = run_few(run_on, first(num_examples), num_examples, layers, device)
    is_ambiguous = run.has_ambiguous()
    if num_examples < probe.num_examples and (is_ambiguous or run.doubtful()):
        few = first(min(probe.num_examples, NUM_COMPARED))
        look_at_rows(run, run_on, few, layers, is_needed=is_ambiguous)
    return run


def run_few(
    run_on: RunOn,
    few: FewExamples,
    num_examples: int,
    layers: Mapping[str, nn.Module],
    device: torch.device,
    *,
    exchanged: Mapping[int, int] | None = None,
    kept: Collection[str] = (),
) -> SmallRun:
    """Run a model on a few examples.

    Args:
        run_on: Calls the model.
        few: The examples.
        num_examples: How many of them.
        layers: The layers to look at, by name.
        device: Where the model is.
        exchanged: The examples that are taken instead of some of them.
        kept: The outputs of which values are kept.
    """
    run = SmallRun(num_examples, device)
    inputs = few.first(num_examples, exchanged)
    orders = ValueOrders(inputs) if kept and not exchanged else None

    def on_call(name: str, _: nn.Module, __: object, output: object) -> None:
        for suffix, tensor in tensor_leaves(output):
            key = f"{name}{suffix}"
            if not tensor.is_nested:
                run.shapes[key] = tensor.shape
                run.dtypes[key] = tensor.dtype
            if orders is not None and orders.were_taken:
                run.rows[key] = Unknown(
                    "rows were sorted or selected before it, so that a few examples do not speak "
                    "for others"
                )
            elif key in kept:
                run.values[key] = tensor.detach().clone()

    # An example draws the same numbers whichever others there are.
    random_states = RandomStates()
    try:
        random_states.seed()
        with torch.no_grad(), tapped(layers, on_call), orders or nullcontext():
            output = run_on(inputs)
    finally:
        random_states.restore()
    run.root = {path: x.shape for path, x in tensor_leaves(output) if not x.is_nested}
    return run


def look_at_rows(
    run: SmallRun,
    run_on: RunOn,
    few: FewExamples,
    layers: Mapping[str, nn.Module],
    *,
    is_needed: bool = False,
) -> None:
    """Run a model on another number of examples, and find out whose rows its outputs have.

    Only where a first axis has grown with the examples each of them is exchanged for another.

    Args:
        run: What a first number of examples has shown; what is found is added to it.
        run_on: Calls the model.
        few: The examples, more than those.
        layers: The layers to look at, by name.
        is_needed: The axes of some outputs cannot be told otherwise.
    """
    number, doubtful = run.num_examples + 1, run.doubtful()
    try:
        other = run_few(run_on, few, number, layers, run.device, kept=doubtful)
    except Exception as error:
        reason = f"the model fails on {number} of them: {type(error).__name__}"
        run.rows |= {name: Unknown(reason) for name in doubtful}
        if is_needed:
            run.other = run_few(run_on, few, number, layers, run.device)
        return
    run.other = other
    shapes = other.shapes
    growing = [
        name
        for name in doubtful
        if name in shapes and grows(run.shapes[name], run.num_examples, shapes[name], number)
    ]
    run.rows |= {name: other.rows[name] for name in growing if name in other.rows}
    unsure = [name for name in growing if name in other.values]
    other.rows.clear()
    values, other.values = other.values, {}
    if not unsure:
        return
    instead = exchanges(few, number)
    if instead is None:
        run.rows |= {name: Unknown("they are alike", is_final=False) for name in unsure}
        return
    changed: dict[str, dict[int, Tensor | None]] = {name: {} for name in unsure}
    for example, by in instead.items():
        again = run_few(
            run_on, few, number, layers, run.device, exchanged={example: by}, kept=unsure
        )
        for name in unsure:
            changed[name][example] = changed_rows(values[name], again.values.get(name))
    run.rows |= {name: rows_in(values[name], changed[name], number) for name in unsure}


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
