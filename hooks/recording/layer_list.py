"""A look at a model before it is trained: which layers a selector takes, and their shapes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sonde.hooks.examples.probe import Probe, call, device_of, undisturbed
from sonde.hooks.model.layers import Selector, select_layers, unwrap
from sonde.hooks.model.taps import tapped, tensor_leaves

from .text_table import TextTable


@dataclass(frozen=True)
class Layer:
    """One layer that a selector takes.

    Attributes:
        name: Its canonical path.
        type: The name of its class.
        num_parameters: The number of its own parameters' elements, those of its children aside.
        outputs: The shape of each tensor it put out, by the name under which it is recorded; empty
            if it was not called. None if no inputs were given.
    """

    name: str
    type: str
    num_parameters: int
    outputs: dict[str, tuple[int, ...]] | None


class Layers(TextTable[Layer]):
    """The layers a selector takes, as a list that prints as a table.

    Args:
        items: The layers.
    """

    _columns = ("layer", "type", "parameters", "output")

    def _rows(self) -> Iterator[tuple[str, ...]]:
        for layer in self._items:
            size = f"{layer.num_parameters:,}" if layer.num_parameters else ""
            yield layer.name or "(model)", layer.type, size, _outputs_text(layer)


def layers(
    model: nn.Module,
    select: Selector | Sequence[Selector] | None = None,
    *,
    inputs: Any = None,
) -> Layers:
    """List the layers that a selector takes of a model, as a measure would.

    Args:
        model: The model; it is left as it was.
        select: Globs, module types or predicates; None takes every module without children.
        inputs: What the model is called with: a tensor, a tuple or dict of tensors, or a `Probe`,
            of which two examples are taken. With it the shapes of the outputs are listed.

    Returns:
        One `Layer` each, in the order of the model.

    Raises:
        LayerNotFoundError: If a selector takes nothing.
        UnsupportedModelError: If the model runs without calling its modules.

    Example:
        >>> layers(nn.Sequential(nn.Linear(4, 3), nn.ReLU()), inputs=torch.zeros(2, 4))
        layer  type    parameters  output
        0      Linear  15          2 × 3
        1      ReLU                2 × 3
    """
    inner = unwrap(model)
    selected = select_layers(inner, select)
    outputs = None if inputs is None else _outputs(inner, selected, inputs)
    return Layers(
        [
            Layer(
                name,
                type(module).__name__,
                sum(p.numel() for p in module.parameters(recurse=False) if _has_size(p)),
                None if outputs is None else outputs[name],
            )
            for name, module in selected.items()
        ]
    )


def _outputs(
    model: nn.Module, selected: dict[str, nn.Module], inputs: Any
) -> dict[str, dict[str, tuple[int, ...]]]:
    probe = inputs if isinstance(inputs, Probe) else Probe(inputs)
    found: dict[str, dict[str, tuple[int, ...]]] = {name: {} for name in selected}
    name_of = {module: name for name, module in selected.items()}

    def on_call(name: str, module: nn.Module, _: Any, output: Any) -> None:
        for suffix, tensor in tensor_leaves(output):
            found[name_of[module]][f"{name}{suffix}"] = tuple(tensor.shape)

    with undisturbed(model), torch.no_grad(), tapped(selected, on_call):
        call(model, probe.rows(slice(0, 2), device_of(model))[0])
    return found


def _outputs_text(layer: Layer) -> str:
    if layer.outputs is None:
        return ""
    if not layer.outputs:
        return "not called"
    return ", ".join(
        name.removeprefix(layer.name) + (" " if name != layer.name else "") + _shape_text(shape)
        for name, shape in layer.outputs.items()
    )


def _shape_text(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape)) or "scalar"


def _has_size(parameter: nn.Parameter) -> bool:
    return not isinstance(parameter, nn.UninitializedParameter)
