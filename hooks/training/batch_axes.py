"""Batch axes: which axis of a layer's output holds the examples.

An axis may have the size of the batch by chance, such as the time steps. So the model is run once
on fewer examples; the batch axis is the one that has become as short. Where the first axis holds
several rows of each example, such as windows, a few more runs show whose they are.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sonde.hooks.examples.probe import device_of, undisturbed
from sonde.hooks.examples.rows import FewExamples, OutputPlace
from sonde.hooks.examples.small_runs import SmallRun, look_at_rows, run_few
from sonde.hooks.model.precision import as_outside
from sonde.hooks.model.ranks import has_sharded_parameters
from sonde.hooks.model.state import MadeParametersError
from sonde.hooks.model.taps import tensor_leaves

_PLAIN = (int, float, str, bool, type(None), torch.dtype, torch.device)


class BatchAxes:
    """The batch axes of a model's layers in the training, found on the first batch it sees.

    Args:
        batch_dim: The axis of the model's inputs that holds the examples.

    Attributes:
        batch_dim: The same.
        problem: Why no run on fewer examples has shown the axes.
    """

    def __init__(self, batch_dim: int = 0) -> None:
        self.batch_dim = batch_dim
        self._small: SmallRun | None = None
        self._shapes: Hashable = None  # Those of what the model was called with then.
        self._places: dict[str, OutputPlace] = {}  # As batches larger than the small one showed.
        self._layers: dict[str, nn.Module] = {}
        self.problem: str | None = None

    def watch(self, layers: Mapping[str, nn.Module]) -> None:
        """Look at these layers, too."""
        if not layers.items() <= self._layers.items():
            self._layers.update(layers)
            self._small = None

    def size_of(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | None:
        """Return the number of examples in the model's arguments."""
        for _, tensor in tensor_leaves([*args, *kwargs.values()]):
            if tensor.ndim > self.batch_dim:
                return tensor.shape[self.batch_dim]
        return None

    def give_up(self, problem: str) -> None:
        """Do not look, for a reason."""
        if self._small is None:
            self.problem = problem

    def look(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], size: int | None
    ) -> None:
        """Run the model on the first examples of a batch, unless that was done before.

        It is done again where outputs have several rows of each example, and this batch may show
        what another one has not: their number, or whose they are.

        Where this is not possible, `problem` says why, and only axis 0 can be the batch.
        """
        if self.problem or not size or size < 2:
            return
        before = self._small
        shapes = self._shapes_of((args, kwargs), size)
        if before is not None and before.is_settled:
            if not before.rows or shapes == self._shapes:
                return
        problem = None
        if has_sharded_parameters(model):
            # Another rank may have another number of examples, and not run the model now.
            problem = "running a sharded model needs all ranks"
        elif not all(is_plain(value) for value in (*args, *kwargs.values())):
            problem = "its arguments contain objects that a second pass might change"
        if problem is not None:
            self.problem = problem if before is None else None
            return
        few = FewExamples((args, kwargs), lambda tensor: self._axis_of(tensor, size))
        number = 2 if size > 2 else 1
        autocast = as_outside(device_of(model).type)
        try:
            with undisturbed(model), autocast:
                self._small = _looked(model, few, number, self._layers)
            self._shapes = shapes
        except MadeParametersError:
            pass  # A later pass can be looked at.
        except Exception as error:
            if before is None:
                self.problem = f"it fails on {number} examples: {type(error).__name__}: {error}"

    def place(self, name: str, shape: Sequence[int], size: int) -> OutputPlace | str:
        """Return where the examples are in an output of a layer's call, or why that is not known.

        Args:
            name: The name of the output.
            shape: Its shape for `size` examples.
            size: The number of examples.
        """
        small = self._small
        known = self._places.get(name)
        is_small = small is not None and size == small.num_examples
        if is_small and known is not None and known.holds(shape, size):
            return known
        place = (small or SmallRun(0)).place(name, shape, size)
        if isinstance(place, OutputPlace) and not is_small:
            self._places[name] = place
        return place

    def _axis_of(self, tensor: Tensor, size: int) -> int | None:
        dim = self.batch_dim
        return dim if tensor.ndim > dim and tensor.shape[dim] == size else None

    def _shapes_of(self, given: Any, size: int) -> Hashable:
        """Return the shapes of an example in what a model is called with."""
        found = []
        for path, tensor in tensor_leaves(given):
            shape, axis = list(tensor.shape), self._axis_of(tensor, size)
            if axis is not None:
                shape[axis] = -1
            found.append((path, *shape))
        return tuple(found)


def _looked(
    model: nn.Module, few: FewExamples, number: int, layers: Mapping[str, nn.Module]
) -> SmallRun:
    def run_on(given: Any) -> Any:
        args, kwargs = given
        return model(*args, **kwargs)

    run = run_few(run_on, few, number, layers, device_of(model))
    if run.doubtful():
        look_at_rows(run, run_on, few, layers)
    return run


def is_plain(value: Any) -> bool:
    """Tell whether an argument of a model holds nothing that a pass might change but tensors."""
    if isinstance(value, list | tuple):
        return all(is_plain(item) for item in value)
    if isinstance(value, dict):
        return all(is_plain(item) for item in value.values())
    return isinstance(value, (Tensor, *_PLAIN))
