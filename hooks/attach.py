"""The one-line form: attach a recorder with good defaults."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from sonde.exceptions import InvalidInputError

from .losses import Loss
from .measures import (
    Activations,
    DecisionPlanes,
    ExampleGradients,
    Measure,
    Predictions,
    Scalars,
)
from .probes import Probe
from .recorder import Recorder
from .schedule import Schedule
from .select import Selector


def attach(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    path: str | os.PathLike[str],
    *,
    probe: Probe | Any,
    loss: Loss | None = None,
    layers: Selector | Sequence[Selector] | None = None,
    when: Schedule | None = None,
    planes: int = 0,
    resolution: int = 32,
    **options: Any,
) -> Recorder:
    """Record a training with one line.

    Records activations (Gram matrices of every layer), predictions and scalars; with integer
    targets per-example gradients too. Decision planes are recorded where they are asked for, as
    they cost planes × resolution² evaluations of the model. For anything else build a `Recorder`.

    Args:
        model: The model.
        optimizer: Its optimizer; steps are counted by it.
        path: The run directory.
        probe: The examples to measure on: a `Probe`, or what one takes.
        loss: (outputs, targets) to a scalar; by default cross-entropy, if targets are integers.
        layers: The layers whose activations are recorded; None takes every module without children.
        when: When to measure; by default log-spaced, for ever.
        planes: How many decision planes through the probe's examples; they need floating-point
            inputs of at least three classes.
        resolution: Points per axis of a decision plane.
        options: Passed on to `Recorder`.

    Returns:
        The recorder, attached. It closes itself at interpreter exit.

    Raises:
        InvalidInputError: If planes are asked for and the probe does not allow them.
        SondeError: If another argument does not fit; see `Recorder`.
    """
    examples = probe if isinstance(probe, Probe) else Probe(probe)
    targets = examples.targets
    has_classes = targets is not None and targets.ndim == 1 and not targets.is_floating_point()
    measures: list[Measure] = [
        Activations(examples, layers),
        Predictions(examples),
        Scalars(),
    ]
    if loss is None and has_classes:
        loss = F.cross_entropy
    if loss is not None and targets is not None:
        measures.append(ExampleGradients(examples, loss))
    if planes:
        inputs = examples.inputs
        if targets is None or not isinstance(inputs, torch.Tensor):
            raise InvalidInputError(
                "`planes` needs a probe of one input tensor with classes as targets; "
                "give Probe(inputs, targets), or leave `planes` out"
            )
        measures.append(
            DecisionPlanes(
                inputs, targets, triplets=planes, resolution=resolution, ids=examples.ids
            )
        )
    return Recorder(path, model, measures, when=when, **options).attach(optimizer)
