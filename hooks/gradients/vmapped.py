"""The fallback for parameters without a rule: `torch.func`, an example at a time within vmap."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sonde.hooks.examples.axes import ExampleAxes
from sonde.hooks.examples.probe import Inputs, call, map_inputs
from sonde.hooks.gradients.factors.dense import Dense, Factor
from sonde.hooks.gradients.rules.places import UnsupportedError, reason_of, widened
from sonde.hooks.losses.float64_heads import Float64Heads
from sonde.hooks.losses.per_example import Loss, example_loss
from sonde.hooks.model.own_warnings import without_warnings

from .batch import loss_of_model

# What the gradients of the examples that are evaluated at once may take.
_CHUNK_BYTES = 256 << 20


def fallback_gradients(
    model: nn.Module,
    loss: Loss | None,
    inputs: Inputs,
    targets: Tensor | None,
    num_examples: int,
    parameters: Sequence[nn.Parameter],
    example_axes: ExampleAxes | None = None,
) -> dict[nn.Parameter, Factor]:
    """Form the per-example gradients of some parameters.

    Args:
        model: The model, in eval mode.
        loss: Its loss; None where the model returns it.
        inputs: What it is called with.
        targets: One target per example.
        num_examples: The number of examples.
        parameters: The parameters.
        example_axes: Tells where the examples are; by default along the first axis.

    Raises:
        UnsupportedError: If the model cannot be transformed.
    """
    if any(hasattr(parameter, "placements") for parameter in model.parameters()):
        raise UnsupportedError("torch.func gives wrong gradients of sharded parameters (FSDP)")
    names = {tensor: name for name, tensor in model.named_parameters()}
    values = {names[parameter]: parameter.detach() for parameter in parameters}

    def loss_alone(given: dict[str, Tensor], row: Inputs, target: Tensor | None) -> Tensor:
        alone = map_inputs(lambda x, axis: x.unsqueeze(axis), row, axes)
        with Float64Heads() as heads:
            outputs = torch.func.functional_call(_Called(model), _prefixed(given), (alone,))
        if loss is None:
            return loss_of_model(outputs)
        lifted = None if target is None else target.unsqueeze(target_axis)
        return example_loss(loss, outputs, lifted, heads).reshape(())

    where = example_axes or ExampleAxes()
    axes = map_inputs(where.of, inputs)
    target_axis = 0 if targets is None else where.of(targets)
    row_bytes = sum(parameter.nbytes for parameter in parameters)
    transformed = torch.vmap(
        torch.func.grad(loss_alone),
        in_dims=(None, axes, None if targets is None else target_axis),
        chunk_size=max(1, min(num_examples, _CHUNK_BYTES // max(1, row_bytes))),
    )
    try:
        with without_warnings(of_torch=True):  # A slow path within vmap is still a path.
            gradients = transformed(values, inputs, targets)
    except Exception as error:  # Whatever a model does that cannot be transformed is the reason.
        raise UnsupportedError(f"torch.func fails: {reason_of(error)}") from error
    return {p: Dense(widened(gradients[names[p]].detach())) for p in parameters}


class _Called(nn.Module):
    """A model that is called with whatever a probe holds."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Inputs) -> object:
        return call(self.model, inputs)


def _prefixed(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"model.{name}": value for name, value in values.items()}
