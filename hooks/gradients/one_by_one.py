"""The last fallback: one example after the other, each in a batch of its own.

It needs nothing of a model but that autograd goes back through it, so it covers what no rule does
and `torch.func` cannot transform: experts in grouped products, kernels, scripts, masks that depend
on values. It takes a forward and a backward pass for each example.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from sonde.hooks.examples.probe import Probe
from sonde.hooks.gradients.factors.dense import Dense, Factor
from sonde.hooks.gradients.rules.places import UnsupportedError, reason_of, widened
from sonde.hooks.losses.per_example import Loss
from sonde.hooks.model.ranks import has_sharded_parameters

from .checks import loss_alone
from .given_examples import GivenExamples


def gradients_one_by_one(
    model: nn.Module,
    loss: Loss | None,
    examples: GivenExamples,
    parameters: Sequence[nn.Parameter],
    *,
    has_functions: bool = False,
) -> dict[nn.Parameter, Factor]:
    """Form the gradients of some parameters by a pass for each example, which holds all rows.

    Random numbers are those that a probe evaluated in batches of one example draws.

    Args:
        model: The model, in eval mode.
        loss: Its loss; None where the model returns it.
        examples: The examples.
        parameters: The parameters.
        has_functions: Whether autograd functions use parameters, which may run a backward pass of
            their own, as a checkpoint does.

    Raises:
        UnsupportedError: If an example alone fails, or parameters are sharded.
    """
    if has_sharded_parameters(model):
        raise UnsupportedError("one example after the other needs parameters that are whole (FSDP)")
    rows = [
        widened(parameter.new_empty(examples.num_examples, parameter.numel(), requires_grad=False))
        for parameter in parameters
    ]
    of_one = _gradients_by_backward if has_functions else _gradients_alone
    for at in range(examples.num_examples):
        example = examples.rows.start + at
        examples.seed(example)
        try:
            alone = of_one(model, loss, examples.probe, example, parameters)
        except Exception as error:  # Whatever a model does to a batch of one, it is the reason.
            raise UnsupportedError(f"one example alone fails: {reason_of(error)}") from error
        for of_parameter, gradient in zip(rows, alone, strict=True):
            of_parameter[at] = gradient
    return {p: Dense(of) for p, of in zip(parameters, rows, strict=True)}


def _gradients_alone(
    model: nn.Module, loss: Loss | None, probe: Probe, row: int, tensors: Sequence[nn.Parameter]
) -> list[Tensor]:
    """Return the gradients of one example, each flattened."""
    with torch.enable_grad():
        value = loss_alone(model, loss, probe, row)
        gradients = torch.autograd.grad(value, tensors, allow_unused=True)
    return _flattened(gradients, tensors)


def _flattened(gradients: Sequence[Tensor | None], tensors: Sequence[nn.Parameter]) -> list[Tensor]:
    return [
        (torch.zeros_like(t) if g is None else g).detach().to_dense().flatten()
        for g, t in zip(gradients, tensors, strict=True)
    ]


class _Loss(nn.Module):
    """Goes back from the loss of an example, while the model has other parameters."""

    def __init__(self, model: nn.Module, loss: Loss | None) -> None:
        super().__init__()
        self.model = model
        self.loss_of = partial(loss_alone, model, loss)

    def forward(self, probe: Probe, row: int) -> None:
        self.loss_of(probe, row).backward()


def _gradients_by_backward(
    model: nn.Module, loss: Loss | None, probe: Probe, row: int, tensors: Sequence[nn.Parameter]
) -> list[Tensor]:
    """Return the gradients of one example as `.grad` gets them, each flattened.

    What a function's own backward pass adds to `.grad`, `torch.autograd.grad` does not return. So
    others stand for the parameters, as nothing of `.grad` or of its hooks may be touched.
    """
    stand_ins = {p: nn.Parameter(p.detach(), p.requires_grad) for p in model.parameters()}
    names: dict[str, Tensor] = {
        f"model.{name}": stand_ins[p] for name, p in model.named_parameters()
    }
    with torch.enable_grad():
        torch.func.functional_call(_Loss(model, loss), names, (probe, row))
    return _flattened([stand_ins[tensor].grad for tensor in tensors], tensors)
