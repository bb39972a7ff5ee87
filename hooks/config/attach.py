"""The one-line form: attach a recorder with good defaults."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from sonde.exceptions import InvalidInputError
from sonde.hooks.recording.recorder import Recorder

from .config import Config, as_config


def attach(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: Config | str | os.PathLike[str],
    /,
    **options: Any,  # Any: each has a type of its own.
) -> Recorder:
    """Record a training with one line: `sonde.attach(model, optimizer, "runs/a", probe=probe)`.

    What is recorded is said by the arguments of `Config`. With a probe, activations, predictions
    and scalars; with integer targets per-example gradients too. Without a probe, the activations of
    the training itself, in band.

    Args:
        model: The model.
        optimizer: Its optimizer; steps are counted by it.
        config: The run directory, or a `Config`.
        options: Arguments of `Config`: probe, loss, layers, when, planes, …; and of `Recorder`:
            config, steps_per_epoch, resume, overwrite, ….

    Returns:
        The recorder, attached. It closes itself at interpreter exit.

    Raises:
        InvalidInputError: If an option has no such name, or needs what is not there.
        SondeError: If another argument does not fit; see `Recorder`.
    """
    made = as_config(config, options)
    if made.id_key is not None or made.reduction is not None:
        raise InvalidInputError(
            "`id_key` and `reduction` are for trainers, whose batches sonde sees; "
            "in a loop of your own call recorder.batch(ids=…, loss=…, reduction=…)"
        )
    return made.recorder(model, optimizer)
