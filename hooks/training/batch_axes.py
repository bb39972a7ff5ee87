"""Batch axes: which axis of a layer's output holds the examples.

An axis may have the size of the batch by chance, such as the time steps. So the model is run once
on fewer examples; the batch axis is the one that has become as short.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sonde.hooks.examples.axes import batch_axis
from sonde.hooks.examples.probe import device_of, undisturbed
from sonde.hooks.model.precision import as_outside
from sonde.hooks.model.ranks import has_sharded_parameters
from sonde.hooks.model.state import MadeParametersError
from sonde.hooks.model.taps import map_tensors, tapped, tensor_leaves

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
        self._small_size = 0
        self._small_shapes: dict[str, tuple[int, ...]] = {}
        self._axes: dict[str, int] = {}  # As batches larger than the small one have shown.
        self._layers: dict[str, nn.Module] = {}
        self.problem: str | None = None

    def watch(self, layers: Mapping[str, nn.Module]) -> None:
        """Look at these layers, too."""
        if not layers.items() <= self._layers.items():
            self._layers.update(layers)
            self._small_size = 0

    def size_of(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | None:
        """Return the number of examples in the model's arguments."""
        for _, tensor in tensor_leaves([*args, *kwargs.values()]):
            if tensor.ndim > self.batch_dim:
                return tensor.shape[self.batch_dim]
        return None

    def give_up(self, problem: str) -> None:
        """Do not look, for a reason."""
        if not self._small_size:
            self.problem = problem

    def look(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], size: int | None
    ) -> None:
        """Run the model on the first examples of a batch, unless that was done before.

        Where this is not possible, `problem` says why, and only axis 0 can be the batch.
        """
        if self._small_size or self.problem or not size or size < 2:
            return
        if has_sharded_parameters(model):
            # Another rank may have another number of examples, and not run the model now.
            self.problem = "running a sharded model needs all ranks"
            return
        if not all(is_plain(value) for value in (*args, *kwargs.values())):
            self.problem = "its arguments contain objects that a second pass might change"
            return
        self._small_size = 2 if size > 2 else 1
        rows = self._small_size

        def shorten(tensor: Tensor) -> Tensor:
            dim = self.batch_dim
            if tensor.ndim > dim and tensor.shape[dim] == size:
                tensor = tensor.narrow(dim, 0, rows)
            return tensor.detach().clone()

        def on_call(name: str, _: nn.Module, __: Any, output: Any) -> None:
            for suffix, tensor in tensor_leaves(output):
                self._small_shapes[f"{name}{suffix}"] = tuple(tensor.shape)

        autocast = as_outside(device_of(model).type)
        try:
            with (
                undisturbed(model),
                torch.no_grad(),
                autocast,
                tapped(self._layers, on_call),
            ):
                model(*map_tensors(args, shorten), **map_tensors(kwargs, shorten))
        except MadeParametersError:
            self._small_size = 0  # A later pass can be looked at.
            self._small_shapes.clear()
        except Exception as error:
            self.problem = f"it fails on {rows} examples: {type(error).__name__}: {error}"
            self._small_shapes.clear()

    def axis(self, name: str, shape: Sequence[int], size: int | None) -> int | None:
        """Return the batch axis of an output of a layer's call; None if there is none."""
        if size is None:
            return None
        known = self._axes.get(name)
        if size == self._small_size and known is not None:
            return known if known < len(shape) and shape[known] == size else None
        small = self._small_shapes.get(name)
        seen = [] if small is None else [(self._small_size, small)]
        axis = batch_axis(shape, size, *seen)
        if axis is not None and size != self._small_size:
            self._axes[name] = axis
        return axis


def is_plain(value: Any) -> bool:
    """Tell whether an argument of a model holds nothing that a pass might change but tensors."""
    if isinstance(value, list | tuple):
        return all(is_plain(item) for item in value)
    if isinstance(value, dict):
        return all(is_plain(item) for item in value.values())
    return isinstance(value, (Tensor, *_PLAIN))
