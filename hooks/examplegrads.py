"""Per-example gradients of a set of examples: one forward and one backward pass, no loop.

The forward pass keeps each layer's input and the place of its output in the graph; one backward
pass of the summed losses gives the gradients with respect to those outputs; a rule per layer type
turns both into per-example gradients, and only Gram matrices over the examples are formed. The
gradient of one example is that of its own loss, not divided by the number of examples.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from .factors import Dense, Factor
from .gradient_rules import Call, UnsupportedError, rule_for
from .losses import Loss, example_losses
from .probes import Inputs, Probe, call, device_of, undisturbed
from .select import layers_of
from .taps import tapped

# The sum of a tied parameter's gradients is formed, so its size is bounded.
_TIED_BYTES = 1 << 30

EXACT = "exact"

# How many examples are run alone to check the kernels, and how far those may be off, relative to
# the norms of the two gradients: rounding differs between a batch and an example alone.
_NUM_CHECKED = 2
_TOLERANCES = {torch.float64: 1e-6, torch.float32: 2e-2}
_HALF_TOLERANCE = 0.2
# Gradients that are zero but for rounding, such as those of a key's bias, are compared with the
# squared norm over all parameters, times this.
_ROUNDING = 1e-6


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
    model: nn.Module,
    loss: Loss,
    probe: Probe,
    layers: Mapping[str, nn.Module] | None = None,
    *,
    verdicts: dict[str, str] | None = None,
) -> ExampleGradientGrams:
    """Compute the Gram matrix of per-example gradients of every layer.

    A rule sees what a layer's call saw, and cannot know what else happened: an axis that only looks
    like the batch, a weight also used by a function, examples that a normalization couples. So each
    parameter has to agree, once, with the gradients of two examples that are run alone; if it does
    not, it is left out and named.

    Args:
        model: The model; it is left as it was.
        loss: (outputs, targets) of a batch to a scalar. It is applied to one example at a time, so
            mean and sum over the batch give the same, and class weights that a mean divides out
            have no effect.
        probe: The examples, with targets.
        layers: Only parameters of these layers; None takes all.
        verdicts: What earlier calls found for this model, by parameter; it is added to, and what
            stands in it is not checked again.

    Returns:
        The matrices by layer, and what is covered.

    Raises:
        InvalidInputError: If the loss is no scalar, or the outputs have no row per example.
    """
    known = {} if verdicts is None else verdicts
    every_layer = layers_of(model)
    owners = _owners(every_layer, every_layer if layers is None else layers)
    with undisturbed(model):
        result, samples = _grams(model, loss, probe, every_layer, owners, known)
        unchecked = [name for name, kind in result.coverage.items() if kind == EXACT]
        unchecked = [name for name in unchecked if name not in known]
        if unchecked:
            known.update(_verdicts(model, loss, probe, owners, samples))
            if any(known[name] != EXACT for name in unchecked):
                result, _ = _grams(model, loss, probe, every_layer, owners, known)
    return result


def _grams(
    model: nn.Module,
    loss: Loss,
    probe: Probe,
    modules: Mapping[str, nn.Module],
    owners: _Owners,
    known: Mapping[str, str],
) -> tuple[ExampleGradientGrams, _Samples]:
    result = ExampleGradientGrams()
    for parameter in owners.parameters:
        if not parameter.tensor.requires_grad:
            result.coverage.update(dict.fromkeys(parameter.names, "frozen"))
    calls, losses = _calls(model, loss, probe, {name: modules[name] for name in owners.layers})
    # Gradients are largest, and rounding matters least, where the loss is.
    largest = losses.nan_to_num().topk(min(_NUM_CHECKED, len(losses))).indices.tolist()
    samples = _Samples(largest)
    with torch.no_grad():
        for group in owners.groups():
            _add_group(result, group, modules, calls, known, samples)
    return result, samples


@dataclass
class _Samples:
    """Entries of each parameter's Gram matrix, to hold against gradients of examples alone."""

    rows: list[int]
    grams: dict[str, Tensor] = field(default_factory=dict)


def _verdicts(
    model: nn.Module, loss: Loss, probe: Probe, owners: _Owners, samples: _Samples
) -> dict[str, str]:
    """Compare each parameter's kernel with the gradients of a few examples, each run alone."""
    checked = [p for p in owners.parameters if p.names[0] in samples.grams]
    try:
        alone = [_gradients_alone(model, loss, probe, row, checked) for row in samples.rows]
    except Exception as error:  # Whatever a model does to a batch of one, it is the reason.
        reason = f"unsupported: one example alone fails: {type(error).__name__}: {error}"
        return {name: reason for parameter in checked for name in parameter.names}
    expected = {
        parameter.names[0]: torch.stack([gradients[at] for gradients in alone])
        for at, parameter in enumerate(checked)
    }
    total = sum(float((g.double() ** 2).sum()) for g in expected.values())
    verdicts = {}
    for parameter in checked:
        gradients = expected[parameter.names[0]].double()
        exact, actual = gradients @ gradients.T, samples.grams[parameter.names[0]].cpu()
        norms = exact.diagonal().clamp(min=0).sqrt()
        tolerance = _TOLERANCES.get(parameter.tensor.dtype, _HALF_TOLERANCE)
        allowed = tolerance * norms[:, None] * norms + _ROUNDING * tolerance * total
        agrees = (actual - exact).abs() <= allowed
        # Where the loss itself has diverged, both are no numbers, and nothing can be compared.
        is_exact = bool((agrees | ~exact.isfinite()).all())
        verdict = EXACT if is_exact else "unsupported: the gradient of one example alone differs"
        verdicts.update(dict.fromkeys(parameter.names, verdict))
    return verdicts


def _gradients_alone(
    model: nn.Module, loss: Loss, probe: Probe, row: int, parameters: Sequence[_Parameter]
) -> list[Tensor]:
    """Return the gradients of one example, run in a batch of its own, flattened, on the CPU."""
    with torch.enable_grad():
        inputs, targets = probe.rows(slice(row, row + 1), device_of(model))
        value = loss(call(model, inputs), targets)
        tensors = [parameter.tensor for parameter in parameters]
        gradients = torch.autograd.grad(value.sum(), tensors, allow_unused=True)
    return [
        (torch.zeros_like(t) if g is None else g).detach().to_dense().flatten().cpu()
        for g, t in zip(gradients, tensors, strict=True)
    ]


@dataclass(frozen=True)
class _Parameter:
    """A parameter and everywhere it is used: (layer, name) pairs."""

    tensor: nn.Parameter
    places: list[tuple[str, str]]

    @property
    def names(self) -> list[str]:
        """Its name at each place."""
        return [f"{layer}.{name}" if layer else name for layer, name in self.places]


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


def _owners(every_layer: Mapping[str, nn.Module], selected: Mapping[str, nn.Module]) -> _Owners:
    """Find the parameters of the selected layers, with all places that use them."""
    found: dict[nn.Parameter, _Parameter] = {}
    for layer, module in every_layer.items():
        # Not named_parameters, which lists a tied parameter once.
        for name, tensor in module._parameters.items():
            if tensor is not None:
                parameter = found.setdefault(tensor, _Parameter(tensor, []))
                parameter.places.append((layer, name))
    return _Owners([p for p in found.values() if any(layer in selected for layer, _ in p.places)])


def _add_group(
    result: ExampleGradientGrams,
    group: Sequence[_Parameter],
    modules: Mapping[str, nn.Module],
    calls: Mapping[str, list[Call] | _Unusable],
    known: Mapping[str, str],
    samples: _Samples,
) -> None:
    """Add the Gram matrix of one layer's parameters, and their coverage."""
    factors: dict[str, dict[str, Factor]] = {}
    for parameter in group:
        verdict = known.get(parameter.names[0], EXACT)
        try:
            for layer, _ in parameter.places:
                if layer not in factors:
                    factors[layer] = _factors(modules[layer], calls[layer])
            factor = _parameter_factor(parameter, factors)
        except UnsupportedError as reason:
            verdict = f"unsupported: {reason}"
        if verdict != EXACT:
            result.coverage.update(dict.fromkeys(parameter.names, verdict))
            continue
        gram = factor.gram()
        layer = parameter.places[0][0]
        samples.grams[parameter.names[0]] = gram[samples.rows][:, samples.rows]
        result.coverage.update(dict.fromkeys(parameter.names, EXACT))
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
) -> tuple[dict[str, list[Call] | _Unusable], Tensor]:
    """Run the examples forward and back; return each layer's calls, and each example's loss."""
    batches: dict[str, list[list[Call] | _Unusable]] = {name: [] for name in layers}
    losses: list[Tensor] = []
    tapped_layers = {name: m for name, m in layers.items() if rule_for(m) is not None}
    with torch.enable_grad():
        for inputs, targets in probe.batches(device_of(model)):
            calls, values = _batch_calls(model, loss, inputs, targets, tapped_layers)
            losses.append(values)
            for name, part in calls.items():
                batches[name].append(part)
    return {name: _joined(parts) for name, parts in batches.items()}, torch.cat(losses)


def _batch_calls(
    model: nn.Module,
    loss: Loss,
    inputs: Inputs,
    targets: Tensor | None,
    layers: Mapping[str, nn.Module],
) -> tuple[dict[str, list[Call] | _Unusable], Tensor]:
    captured: dict[str, list[_Captured | _Unusable]] = {name: [] for name in layers}
    of_module = {module: captured[name] for name, module in layers.items()}

    def on_call(_: str, module: nn.Module, first: Any, output: Any) -> Tensor | None:
        own = None
        if isinstance(output, Tensor) and output.requires_grad and output._is_view():
            # An in-place operation on a view would move it to another place in the graph.
            own = output.clone()
        of_module[module].append(_capture(first, output if own is None else own))
        return own

    with tapped(layers, on_call, first=True):
        outputs = call(model, inputs)
    losses = example_losses(loss, outputs, targets)
    edges = [
        item.edge
        for items in captured.values()
        for item in items
        if isinstance(item, _Captured) and item.edge is not None
    ]
    # Only these gradients are computed; no parameter's own, and no `.grad` is touched.
    deltas = iter(torch.autograd.grad(losses.sum(), edges, allow_unused=True) if edges else ())
    calls = {name: _finish(items, deltas, len(losses)) for name, items in captured.items()}
    return calls, losses.detach()


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
        elif item.edge is None:
            problem = _Unusable("it ran without gradients: under no_grad, or reentrant checkpoints")
        elif delta is None:
            # No path from this output to the loss: the gradient is zero.
            zeros = torch.zeros(item.shape, dtype=item.dtype, device=item.inputs.device)
            calls.append(Call(_widened(item.inputs), _widened(zeros)))
        else:
            calls.append(Call(_widened(item.inputs), _widened(delta)))
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


def _widened(values: Tensor) -> Tensor:
    """Bring half precision to float32, as inner products need it."""
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values
