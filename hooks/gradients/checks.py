"""Checks: per-example gradients held against those of examples that are run alone.

A rule sees what an operation saw, and cannot know what else happened: an axis that only looks like
the batch, examples that a normalization couples, a script that uses a weight unseen.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sonde.hooks.float64_heads import Float64Heads
from sonde.hooks.losses import Loss, example_loss
from sonde.hooks.probes import Probe, call, device_of

from .batches import BatchGradients, loss_of_model
from .held_parameters import HeldParameters
from .layouts import reason_of
from .owned_parameters import OwnedParameter

# How many examples are run alone, and how far off gradients may be, relative to their norms:
# rounding differs between a batch and an example alone.
_NUM_CHECKED = 2
_TOLERANCES = {torch.float64: 1e-6, torch.float32: 2e-2}
_HALF_TOLERANCE = 0.2
# Gradients that are zero but for rounding, such as those of a key's bias, are compared with the
# norm over all parameters, times this.
_ROUNDING = 1e-3


def differing(
    model: nn.Module,
    loss: Loss | None,
    probe: Probe,
    start: int,
    batch: BatchGradients,
    parameters: Sequence[OwnedParameter],
    held: HeldParameters,
) -> dict[nn.Parameter, str]:
    """Return which parameters' gradients differ from those of examples alone, and why.

    Args:
        model: The model, in eval mode.
        loss: Its loss.
        probe: The examples.
        start: The first example of the batch in the probe.
        batch: The gradients of a batch of it.
        parameters: Those to check, each with gradients in the batch.
        held: What stands for the parameters of the model.
    """
    # Gradients are largest, and rounding matters least, where the loss is.
    losses = torch.zeros(batch.num_examples, device="cpu") if batch.losses is None else batch.losses
    largest = losses.nan_to_num().topk(min(_NUM_CHECKED, batch.num_examples)).indices.tolist()
    tensors = [parameter.tensor for parameter in parameters]
    # With sharded parameters no graph reaches those; the layers' own were seen in the batch.
    of_layers = [held.held_for(tensor) for tensor in tensors]
    differ: dict[nn.Parameter, str] = {}
    for row in largest:
        try:
            alone = _gradients_alone(model, loss, probe, start + row, of_layers)
        except Exception as error:  # Whatever a model does to a batch of one, it is the reason.
            reason = f"one example alone fails: {reason_of(error)}"
            return dict.fromkeys(tensors, reason)
        norm = sum(float((gradient.double() ** 2).sum()) for gradient in alone) ** 0.5
        for tensor, exact in zip(tensors, alone, strict=True):
            formed = batch.factors[tensor].form(slice(row, row + 1))[0].double()
            distance = float((formed - exact.double()).norm())
            tolerance = _TOLERANCES.get(tensor.dtype, _HALF_TOLERANCE)
            allowed = tolerance * (float(exact.double().norm()) + _ROUNDING * norm)
            # Where the loss itself has diverged, both are no numbers, and nothing can be compared.
            if not distance <= allowed and bool(exact.isfinite().all()):
                coupled = f": {batch.couplings[0]} couple the examples" if batch.couplings else ""
                differ[tensor] = f"the gradient of one example alone differs{coupled}"
    return differ


def _gradients_alone(
    model: nn.Module, loss: Loss | None, probe: Probe, row: int, tensors: Sequence[nn.Parameter]
) -> list[Tensor]:
    """Return the gradients of one example, run in a batch of its own, flattened."""
    with torch.enable_grad():
        inputs, targets = probe.rows(slice(row, row + 1), device_of(model))
        with Float64Heads() as heads:
            outputs = call(model, inputs)
        if loss is None:
            value = loss_of_model(outputs)
        else:
            value = example_loss(loss, outputs, targets, heads).sum()
        gradients = torch.autograd.grad(value, tensors, allow_unused=True)
    return [
        (torch.zeros_like(t) if g is None else g).detach().to_dense().flatten()
        for g, t in zip(gradients, tensors, strict=True)
    ]
