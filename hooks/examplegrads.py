"""Per-example gradients of a set of examples: one forward and one backward pass, no loop.

The forward pass keeps each layer's input and the place of its output in the graph; one backward
pass of the summed losses gives the gradients with respect to those outputs; a rule per layer type
turns both into per-example gradients, and only Gram matrices over the examples are formed. The
gradient of one example is that of its own loss, not divided by the number of examples.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import tree_map

from sonde.exceptions import InvalidInputError

from .factors import Dense, Factor
from .gradient_rules import Call, UnsupportedError, rule_for
from .probes import Inputs, Probe, call, device_of, undisturbed
from .select import layers_of
from .taps import tapped

Loss: TypeAlias = Callable[[Any, Any], Tensor]
"""The loss of a batch: (outputs, targets) to a scalar, such as `F.cross_entropy`."""

# The sum of a tied parameter's gradients is formed, so its size is bounded.
_TIED_BYTES = 1 << 30

EXACT = "exact"


@dataclass
class ExampleGradientGrams:
    """Gram matrices of per-example gradients.

    Attributes:
        layers: float64 [examples, examples] for each layer with covered parameters.
        coverage: For each parameter `exact`, `frozen`, or `unsupported: why`.
    """

    layers: dict[str, Tensor] = field(default_factory=dict)
    coverage: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Captured:
    """One call of a layer in one batch, before its gradient is known."""

    inputs: Tensor
    edge: GradientEdge | None
    shape: torch.Size
    dtype: torch.dtype
    version: int


class _Unusable(str):
    """Why the calls of a layer cannot be used."""


def example_gradient_grams(
    model: nn.Module, loss: Loss, probe: Probe, layers: Mapping[str, nn.Module] | None = None
) -> ExampleGradientGrams:
    """Compute the Gram matrix of per-example gradients of every layer.

    Args:
        model: The model; it is left as it was.
        loss: (outputs, targets) of a batch to a scalar. It is applied to one example at a time, so
            mean and sum over the batch give the same.
        probe: The examples, with targets.
        layers: Only parameters of these layers; None takes all.

    Returns:
        The matrices by layer, and what is covered.

    Raises:
        InvalidInputError: If the loss is no scalar.
    """
    every_layer = layers_of(model)
    owners = _owners(every_layer if layers is None else layers)
    result = ExampleGradientGrams()
    for parameter in owners.parameters:
        names = [f"{layer}.{name}".lstrip(".") for layer, name in parameter.places]
        if not parameter.tensor.requires_grad:
            result.coverage.update(dict.fromkeys(names, "frozen"))
    with undisturbed(model):
        calls = _calls(model, loss, probe, {name: every_layer[name] for name in owners.layers})
        with torch.no_grad():
            for group in owners.groups():
                _add_group(result, group, every_layer, calls)
    return result


@dataclass(frozen=True)
class _Parameter:
    """A parameter and everywhere it is used: (layer, name) pairs."""

    tensor: nn.Parameter
    places: list[tuple[str, str]]


class _Owners:
    """Which layers own which parameters."""

    def __init__(self, parameters: list[_Parameter]) -> None:
        self.parameters = parameters
        trained = [parameter for parameter in parameters if parameter.tensor.requires_grad]
        self.layers = list(dict.fromkeys(layer for p in trained for layer, _ in p.places))
        self._trained = trained

    def groups(self) -> list[list[_Parameter]]:
        """Return the trained parameters by the layer that owns them first."""
        by_layer: dict[str, list[_Parameter]] = defaultdict(list)
        for parameter in self._trained:
            by_layer[parameter.places[0][0]].append(parameter)
        return list(by_layer.values())


def _owners(layers: Mapping[str, nn.Module]) -> _Owners:
    found: dict[nn.Parameter, _Parameter] = {}
    for layer, module in layers.items():
        # Not named_parameters, which lists a tied parameter once.
        for name, tensor in module._parameters.items():
            if tensor is not None:
                parameter = found.setdefault(tensor, _Parameter(tensor, []))
                parameter.places.append((layer, name))
    return _Owners(list(found.values()))


def _add_group(
    result: ExampleGradientGrams,
    group: Sequence[_Parameter],
    modules: Mapping[str, nn.Module],
    calls: Mapping[str, list[Call] | _Unusable],
) -> None:
    """Add the Gram matrix of one layer's parameters, and their coverage."""
    factors: dict[str, dict[str, Factor]] = {}
    for parameter in group:
        names = [f"{layer}.{name}".lstrip(".") for layer, name in parameter.places]
        try:
            for layer, _ in parameter.places:
                if layer not in factors:
                    factors[layer] = _factors(modules[layer], calls[layer])
            gram = _parameter_factor(parameter, factors).gram()
        except UnsupportedError as reason:
            result.coverage.update(dict.fromkeys(names, f"unsupported: {reason}"))
            continue
        layer = parameter.places[0][0]
        result.coverage.update(dict.fromkeys(names, EXACT))
        result.layers[layer] = result.layers[layer] + gram if layer in result.layers else gram


def _parameter_factor(parameter: _Parameter, factors: Mapping[str, Mapping[str, Factor]]) -> Factor:
    parts = []
    for layer, name in parameter.places:
        if name not in factors[layer]:
            raise UnsupportedError(f"no rule gives the gradient of '{name}' of this layer type")
        parts.append(factors[layer][name])
    if len(parts) == 1:
        return parts[0]
    num_bytes = max(part.num_bytes for part in parts)
    if num_bytes > _TIED_BYTES:
        raise UnsupportedError(
            f"tied between {' and '.join(layer for layer, _ in parameter.places)}, and its "
            f"gradients would take {num_bytes >> 20} MiB"
        )
    total = parts[0].materialize()
    for part in parts[1:]:
        total = total + part.materialize()
    return Dense(total)


def _factors(module: nn.Module, calls: list[Call] | _Unusable) -> dict[str, Factor]:
    rule = rule_for(module)
    if rule is None:
        raise UnsupportedError(f"there is no rule for {type(module).__name__}")
    if isinstance(calls, _Unusable):
        raise UnsupportedError(calls)
    return rule(module, calls)


def _calls(
    model: nn.Module, loss: Loss, probe: Probe, layers: Mapping[str, nn.Module]
) -> dict[str, list[Call] | _Unusable]:
    """Run the examples forward and back; return each layer's calls over all examples."""
    batches: dict[str, list[list[Call] | _Unusable]] = {name: [] for name in layers}
    tapped_layers = {name: m for name, m in layers.items() if rule_for(m) is not None}
    with torch.enable_grad():
        for inputs, targets in probe.batches(device_of(model)):
            for name, calls in _batch_calls(model, loss, inputs, targets, tapped_layers):
                batches[name].append(calls)
    return {name: _joined(parts) for name, parts in batches.items()}


def _batch_calls(
    model: nn.Module,
    loss: Loss,
    inputs: Inputs,
    targets: Tensor | None,
    layers: Mapping[str, nn.Module],
) -> Iterator[tuple[str, list[Call] | _Unusable]]:
    captured: dict[str, list[_Captured | _Unusable]] = {name: [] for name in layers}
    of_module = {module: captured[name] for name, module in layers.items()}

    def on_call(_: str, module: nn.Module, first: Any, output: Any) -> Tensor | None:
        own = None
        if isinstance(output, Tensor) and output.requires_grad and output._is_view():
            # An in-place operation on a view would move it to another place in the graph.
            own = output.clone()
        of_module[module].append(_capture(first, output if own is None else own))
        return own

    with tapped(layers, on_call):
        outputs = call(model, inputs)
    total, num_examples = summed_loss(loss, outputs, targets)
    edges = [
        item.edge
        for items in captured.values()
        for item in items
        if isinstance(item, _Captured) and item.edge is not None
    ]
    # Only these gradients are computed; no parameter's own, and no `.grad` is touched.
    deltas = iter(torch.autograd.grad(total, edges, allow_unused=True) if edges else ())
    for name, items in captured.items():
        yield name, _finish(items, deltas, num_examples)


def _capture(first: Any, output: Any) -> _Captured | _Unusable:
    if not isinstance(first, Tensor) or not isinstance(output, Tensor):
        return _Unusable("its input or output is not a tensor")
    # The edge, not the tensor: an in-place operation on the output does not move it.
    edge = get_gradient_edge(output) if output.requires_grad else None
    return _Captured(first.detach(), edge, output.shape, output.dtype, first._version)


def _finish(
    items: Sequence[_Captured | _Unusable], deltas: Iterator[Tensor | None], num_examples: int
) -> list[Call] | _Unusable:
    calls: list[Call] = []
    problem: _Unusable | None = None if items else _Unusable("its layer was never called")
    for item in items:
        if isinstance(item, _Unusable):
            problem = item
            continue
        delta = next(deltas) if item.edge is not None else None
        sizes = {item.inputs.shape[:1], item.shape[:1]}
        if sizes != {torch.Size([num_examples])}:
            problem = _Unusable(
                f"axis 0 of its input {list(item.inputs.shape)} and output {list(item.shape)} "
                f"is not the batch of {num_examples}"
            )
        elif item.inputs._version != item.version:
            problem = _Unusable("its input was changed in place after the call")
        elif delta is None:
            # No path from this output to the loss: the gradient is zero.
            zeros = torch.zeros(item.shape, dtype=item.dtype, device=item.inputs.device)
            calls.append(Call(item.inputs, zeros))
        else:
            calls.append(Call(item.inputs, delta))
    return problem if problem is not None else calls


def _joined(batches: Sequence[list[Call] | _Unusable]) -> list[Call] | _Unusable:
    """Join each call over the batches, on the axis of the examples."""
    usable: list[list[Call]] = []
    for batch in batches:
        if isinstance(batch, _Unusable):
            return batch
        usable.append(batch)
    if len(usable) == 1:
        return usable[0]
    shapes = {tuple(c.inputs.shape[1:] for c in batch) for batch in usable}
    if len(shapes) > 1:
        return _Unusable("the shape of its input differs between batches")
    return [
        Call(torch.cat([c.inputs for c in calls]), torch.cat([c.delta for c in calls]))
        for calls in zip(*usable, strict=True)
    ]


def summed_loss(loss: Loss, outputs: Any, targets: Tensor | None) -> tuple[Tensor, int]:
    """Return the sum over examples of the loss of each example alone, and their number.

    The loss sees batches of one example, so its reduction over a batch does not matter.

    Raises:
        InvalidInputError: If the loss is no scalar.
    """
    num_examples = len(targets) if targets is not None else _num_rows(outputs)

    def alone(output: Any, target: Any) -> Tensor:
        value = loss(
            tree_map(lambda x: x[None] if isinstance(x, Tensor) else x, output),
            None if target is None else target[None],
        )
        if not isinstance(value, Tensor) or value.numel() != 1:
            given = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise InvalidInputError(
                f"`loss` of one example gave {given}; expected a scalar tensor, as "
                "F.cross_entropy(outputs, targets) gives"
            )
        return value.reshape(())

    in_dims = (0, None if targets is None else 0)
    try:
        return torch.vmap(alone, in_dims)(outputs, targets).sum(), num_examples
    except InvalidInputError:
        raise
    except Exception:  # Whatever vmap cannot transform in a user's loss, a loop can evaluate.
        values = [
            alone(
                tree_map(lambda x, at=row: x[at] if isinstance(x, Tensor) else x, outputs),
                None if targets is None else targets[row],
            )
            for row in range(num_examples)
        ]
        return torch.stack(values).sum(), num_examples


def _num_rows(outputs: Any) -> int:
    sizes: list[int] = []
    tree_map(lambda x: sizes.append(len(x)) if isinstance(x, Tensor) else None, outputs)
    if not sizes:
        raise InvalidInputError("the model returned no tensor, so there is nothing to measure")
    return sizes[0]
