"""What the integrations of trainers share: how a recording begins, and that it ends no training."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn

from sonde.exceptions import SondeError
from sonde.hooks import Recorder
from sonde.hooks.config import Config


def start_recorder(
    config: Config,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    state: Mapping[str, Any] | None,  # Any: what `Recorder.state_dict` returned.
) -> Recorder:
    """Make the recorder for a training that starts, or resumes from a checkpoint.

    Args:
        config: What to record.
        model: The model.
        optimizer: The optimizer that really steps; None where steps are counted otherwise.
        state: The recorder's state from the checkpoint. If it is given, the run is resumed,
            whatever the configuration says; where there is no run, it is created.

    Returns:
        The recorder.

    Raises:
        SondeError: If the configuration does not fit the model, or the state the recorder.
    """
    if state is None:
        return config.recorder(model, optimizer)
    options = {**config.options, "resume": True, "overwrite": False}
    recorder = dataclasses.replace(config, options=options).recorder(model, optimizer)
    try:
        recorder.load_state_dict(state)
    except SondeError:
        recorder.close()
        raise
    return recorder


def stepping_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return the optimizer that really steps; that of Accelerate lets accumulated steps pass."""
    from accelerate.optimizer import AcceleratedOptimizer

    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = cast(torch.optim.Optimizer, optimizer.optimizer)
    return optimizer


@contextmanager
def guarded(recorder: Recorder, what: str) -> Iterator[None]:
    """Let no failure of ours end the training: warn of it once instead, and note it in the log.

    Args:
        recorder: The recorder.
        what: What fails, as in "the loss cannot be read".
    """
    try:
        yield
    except Exception as error:
        recorder.warn(f"{what}: {type(error).__name__}: {error}")
