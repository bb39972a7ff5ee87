"""What is true of gradients: the obvious loop over single examples, in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .losses import LossCase

Rows = dict[str, Tensor]
"""The gradients of each parameter, float64 [examples, *parameter]."""


@dataclass(frozen=True)
class Truth:
    """The gradient of each example's own loss.

    Attributes:
        rows: The gradients.
        losses: The losses, float64 [examples]; what is no number has no gradient.
    """

    rows: Rows
    losses: Tensor


def doubled(value: Any) -> Any:  # a model, a tensor or a loss
    """Return a copy in float64, that nothing wraps; integers stay what they are."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if not isinstance(value, nn.Module):
        return value
    made = copy.deepcopy(value).double()
    made.__dict__.pop("forward", None)  # Such as that of a mixed precision.
    return made


def scores_of(outputs: Any) -> Tensor:
    """Return the scores of what a model returned."""
    if isinstance(outputs, dict):
        outputs = outputs["logits"]
    scores: Tensor = outputs[-1] if isinstance(outputs, tuple) else outputs
    return scores


def own_truth(model: nn.Module, loss: LossCase, inputs: Tensor, targets: Tensor) -> Truth:
    """Run one example after the other, in eval mode or as the model is."""
    assert loss.own is not None
    model = doubled(model)
    named = trained_of(model)
    found: dict[str, list[Tensor]] = {name: [] for name in named}
    losses = []
    for x, y in zip(doubled(inputs), doubled(targets), strict=True):
        value = loss.own(_scores(model, x[None])[0], y)
        losses.append(value.detach())
        _append(found, named, torch.autograd.grad(value, list(named.values()), allow_unused=True))
    return Truth({name: torch.stack(rows) for name, rows in found.items()}, torch.stack(losses))


def contributions(model: nn.Module, batch_loss: Callable[[Tensor], Tensor], inputs: Tensor) -> Rows:
    """Return what each row of the scores adds to the gradient of the batch's loss, undivided.

    Args:
        model: The model, whose examples are apart up to its scores.
        batch_loss: The batch's loss of its scores, float64.
        inputs: The examples.
    """
    model = doubled(model)
    named = trained_of(model)
    found: dict[str, list[Tensor]] = {name: [] for name in named}
    for row in range(len(inputs)):
        scores = _scores(model, doubled(inputs))
        is_row = torch.arange(len(scores)) == row
        only = torch.where(is_row.view(-1, *[1] * (scores.ndim - 1)), scores, scores.detach())
        gradients = torch.autograd.grad(batch_loss(only), list(named.values()), allow_unused=True)
        _append(found, named, gradients)
    return {name: torch.stack(rows) for name, rows in found.items()}


def trained_of(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _scores(model: nn.Module, inputs: Tensor) -> Tensor:
    language_model = getattr(model, "gpt", None)  # Of one that returns its loss.
    return scores_of((language_model or model)(inputs))


def _append(found: dict[str, list[Tensor]], named: dict[str, nn.Parameter], values: Any) -> None:
    for (name, parameter), value in zip(named.items(), values, strict=True):
        found[name].append(torch.zeros_like(parameter) if value is None else value.detach())
