"""A probe of what a training's first batches hold, as its model is called with them."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from sonde.exceptions import InvalidInputError
from sonde.hooks import Probe
from sonde.hooks.examples.axes import ExampleAxes

# Arguments of a model that are targets: with them it computes its loss by itself.
_TARGETS = ("labels", "label", "targets", "target")


class FirstBatches:
    """Collects examples, from one call of a model after the other.

    Args:
        limit: How many examples are kept.
        batch_dim: The axis that holds the examples, of tensors that have so many.

    Attributes:
        batch_dim: The same; it is set before the first batch is added.
        num_examples: How many there are so far.
        is_all: A batch came again, or one of another shape: there will be no more.
    """

    def __init__(self, limit: int, batch_dim: int = 0) -> None:
        self._limit = limit
        self.batch_dim = batch_dim
        self._inputs: list[dict[str, Tensor]] = []
        self._targets: list[Tensor] = []
        self._is_by_name = False
        self.num_examples = 0
        self.is_all = False

    def add(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Take a copy of the examples that a model is called with.

        Args:
            model: The model, without wrappers.
            args: Its arguments by position.
            kwargs: Its arguments by name.

        Raises:
            InvalidInputError: If the model could not be called with them again.
        """
        if self.is_all or self.num_examples >= self._limit:
            self.is_all = True
            return
        inputs, self._is_by_name = _named_inputs(model, args, kwargs)
        targets = inputs.pop(_target_of(model, inputs), None)
        if any(x.layout != torch.strided or x.is_nested for x in inputs.values()):
            raise InvalidInputError("sparse inputs cannot be stored as a probe")
        axes = ExampleAxes(self.batch_dim)
        sizes = {axes.size_of(tensor) for tensor in inputs.values()}
        if len(sizes) != 1 or 0 in sizes:
            shapes = {name: list(tensor.shape) for name, tensor in inputs.items()}
            raise InvalidInputError(f"its inputs {shapes} do not have the same number of examples")
        copied = {name: tensor.detach().to("cpu", copy=True) for name, tensor in inputs.items()}
        if self._inputs and not self._fits(copied):
            self.is_all = True
            return
        self._inputs.append(copied)
        if targets is not None and axes.size_of(targets) == max(sizes):
            self._targets.append(targets.detach().to("cpu", copy=True))
        self.num_examples += sizes.pop()

    def probe(self, rank: int = 0) -> Probe:
        """Return the examples as a probe; ids count in order of arrival, and differ by rank."""
        first_id = rank * self._limit
        size = min(self.num_examples, self._limit)
        joined = {
            name: self._joined([batch[name] for batch in self._inputs], size)
            for name in self._inputs[0]
        }
        has_targets = len(self._targets) == len(self._inputs)
        targets = self._joined(self._targets, size) if has_targets else None
        inputs: Any = joined
        if not self._is_by_name:
            inputs = next(iter(joined.values())) if len(joined) == 1 else tuple(joined.values())
        ids = range(first_id, first_id + size)
        return Probe(inputs, targets, ids=ids, batch_dim=self.batch_dim)

    def _joined(self, tensors: list[Tensor], size: int) -> Tensor:
        axes = ExampleAxes(self.batch_dim)
        return axes.rows_of(torch.cat(tensors, axes.of(tensors[0])), slice(0, size))

    def _shape(self, tensor: Tensor) -> list[int]:
        """Return the shape of an example."""
        axis = ExampleAxes(self.batch_dim).of(tensor)
        return [size for at, size in enumerate(tensor.shape) if at != axis]

    def _fits(self, batch: dict[str, Tensor]) -> bool:
        """Tell whether a batch brings other examples of the same shape as those before."""
        last = self._inputs[-1]
        if last.keys() != batch.keys():
            return False
        if any(self._shape(last[name]) != self._shape(x) for name, x in batch.items()):
            return False
        return not all(torch.equal(last[name], tensor) for name, tensor in batch.items())


def _named_inputs(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[dict[str, Tensor], bool]:
    """Return the tensors a model is called with, and whether it has to be called by their names.

    What is no tensor is left out, if the model has a default for it.

    Raises:
        InvalidInputError: If the model cannot be called with the tensors alone.
    """
    parameters = list(inspect.signature(model.forward).parameters.values())
    places = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    has_names = len(places) >= len(args)
    names = [place.name for place in places] if has_names else [str(i) for i in range(len(args))]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    defaults = {p.name for p in parameters if p.default is not p.empty}
    inputs = {}
    for name, value in given.items():
        if isinstance(value, Tensor) and (value.ndim or name not in {*defaults, *kwargs}):
            inputs[name] = value
        elif name not in defaults and name not in kwargs:
            raise InvalidInputError(
                f"its input `{name}` is a {type(value).__name__}; a probe takes tensors"
            )
    if not inputs:
        raise InvalidInputError("it is called without a tensor")
    is_by_name = bool(kwargs) or list(inputs) != names[: len(inputs)]
    if is_by_name and not has_names:
        raise InvalidInputError("its inputs have no names")
    return inputs, is_by_name


def _target_of(model: nn.Module, inputs: dict[str, Tensor]) -> str:
    """Return the argument that holds the targets; empty if none does, or the model needs it."""
    parameters = inspect.signature(model.forward).parameters
    for name in _TARGETS:
        if name in inputs and len(inputs) > 1:
            if name not in parameters or parameters[name].default is not inspect.Parameter.empty:
                return name
    return ""
