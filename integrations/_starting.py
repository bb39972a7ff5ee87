"""What the integrations of trainers share: how a recording begins, and that it ends no training."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from sonde.exceptions import SondeError
from sonde.hooks import Recorder
from sonde.hooks.config.config import Config
from sonde.hooks.recording.environment import process_rank
from sonde.integrations.launch.run_path import launch_key, reserve, waited_for

# Which of the trainings of this process begins; on every rank the same.
_starts = itertools.count(2)


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


class Trainings:
    """The trainings that one callback sees, one after the other.

    Trainers begin again by themselves: with smaller batches after the memory was full, and for each
    trial of a search. A training that was broken off is recorded anew, as a further attempt in the
    same run directory; after one that ended, the next one gets a directory of its own.

    Args:
        config: What to record.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._last: Recorder | None = None
        self._has_ended = False
        self._said: set[str] = set()

    def end(self) -> None:
        """Note that the training came to its end."""
        self._has_ended = True

    def begin(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        state: Mapping[str, Any] | None,
    ) -> Recorder | None:
        """Make the recorder of a training; the one before is closed.

        Args:
            model: The model.
            optimizer: The optimizer that really steps; None where steps are counted otherwise.
            state: As for `start_recorder`.

        Returns:
            The recorder; None where a training that begins again cannot be recorded, which is
            warned of, as nothing of ours may end it.

        Raises:
            SondeError: If this is the first training, and the configuration does not fit it.
        """
        if self._last is None:
            self._last = start_recorder(self._config, model, optimizer, state)
            return self._last
        was_broken_off, self._has_ended = not self._has_ended, False
        try:
            config, where = self._next(self._last.path, state, was_broken_off=was_broken_off)
            recorder = start_recorder(config, model, optimizer, state)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            self._last.warn(f"a training that begins again is not recorded: {reason}")
            return None
        if where and where not in self._said:
            self._said.add(where)
            recorder.warn(f"a training begins again with the same callback; it is recorded {where}")
        self._last = recorder
        return recorder

    def _next(
        self, path: Path, state: Mapping[str, Any] | None, *, was_broken_off: bool
    ) -> tuple[Config, str]:
        """Return what to record of the next training, and what to say of where."""
        if state is not None:
            return dataclasses.replace(self._config, path=path), ""
        options = {**self._config.options, "overwrite": False}
        if was_broken_off or options.get("resume"):
            options["resume"] = True
            where = f"into {path} as a new attempt, in place of the one before"
        else:
            path, key = _next_path(Path(self._config.path))
            where = f"into {path}"
            if key is not None:
                options["config"] = {**(options.get("config") or {}), "launch": key}
        return dataclasses.replace(self._config, path=path, options=options), where


def _next_path(path: Path) -> tuple[Path, str | None]:
    """Return a directory for a further run, and what its ranks know it by, if there are several."""
    rank, num_ranks = process_rank(os.environ)
    number = next(_starts)
    if num_ranks == 1:
        return reserve(path), None
    key = f"{launch_key(os.environ)}:{number}"
    return (reserve(path) if rank == 0 else waited_for(path, key)), key


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
