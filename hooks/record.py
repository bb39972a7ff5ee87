"""What a measure is given, and what it gives back of one step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from sonde.log import LogArray


@dataclass
class Subject:
    """What is measured.

    Attributes:
        model: The user's own module, without wrappers.
        optimizers: The optimizers the recorder is attached to.
        scalars: The latest value of everything given to `recorder.log`.
    """

    model: nn.Module
    optimizers: list[torch.optim.Optimizer] = field(default_factory=list)
    scalars: dict[str, Any] = field(default_factory=dict)


@dataclass
class Recording:
    """What a measure recorded at one step.

    Attributes:
        arrays: The arrays.
        attributes: What else the record says of itself, as JSON values.
        missing: What could not be recorded, with the reason, by layer or parameter name.
        notes: Facts that seldom change, by event; they are logged when they differ from before.
        warnings: What is warned of and noted, once in a training, by what it is about.
    """

    arrays: list[LogArray] = field(default_factory=list)
    attributes: dict[str, Any] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    notes: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    warnings: Mapping[str, str] = field(default_factory=dict)


class Observation(ABC):
    """A measure of the training itself at one due step, while its passes run."""

    @abstractmethod
    def finish(self) -> Recording:
        """Return what was seen; whatever this raises switches the measure off."""

    @abstractmethod
    def stop(self) -> None:
        """Leave the model as it was."""
