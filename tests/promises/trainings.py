"""A training that is recorded in band, and what is true of it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sonde

from .cases import NUM_EXAMPLES, Setup

NUM_STEPS = 2
LEARNING_RATE = 0.01


@dataclass
class Seen:
    """A micro-batch of which an update of the weights is made.

    Attributes:
        model: The model as it was, before the pass.
        rows: Which examples it has.
    """

    model: nn.Module
    rows: Tensor


@dataclass
class Trained:
    """A recorded training, and what is true of it.

    Attributes:
        run: What was recorded.
        steps: The micro-batches of each update.
        gradients: The gradient of each parameter as it came back, at each update.
        said: What was warned of.
    """

    run: sonde.Run
    steps: list[list[Seen]]
    gradients: list[dict[str, Tensor]]
    said: list[str] = field(default_factory=list)


class Training:
    """A training loop, and what a user tells of it.

    Args:
        path: The run directory.
        setup: The model, examples and loss.
        store: The form of the gradients that are kept.
        tells_loss: The loop tells of its loss, as it should.
    """

    def __init__(self, path: Path, setup: Setup, store: Any, *, tells_loss: bool) -> None:
        self.setup, self._tells_loss = setup, tells_loss
        self.model = setup.model
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=LEARNING_RATE)
        self.optimizer.register_step_pre_hook(lambda *_: self._note_update())
        measure = sonde.ExampleGradients(sonde.TRAINING, store=store)
        self.recorder = sonde.Recorder(path, self.model, [measure], when=sonde.every(1))
        self.recorder.attach(self.optimizer)
        self.steps: list[list[Seen]] = []
        self.gradients: list[dict[str, Tensor]] = []
        self.counted: list[Seen] = []
        self.loss_scale = 1.0  # What a scaler divides out of gradients before the update.

    def batch(self, step: int) -> Tensor:
        """Return the examples of a step."""
        return torch.arange(NUM_EXAMPLES) + NUM_EXAMPLES * (step % NUM_STEPS)

    def forward(self, rows: Tensor, *, is_told: bool = True, divided_by: float = 1) -> Tensor:
        """Run some examples forward; return the loss, told of and divided."""
        self.counted.append(Seen(copy.deepcopy(self.model), rows))
        inputs, targets = self.setup.inputs[rows], self.setup.targets[rows]
        if self.setup.returns_loss:
            outputs = self.model(inputs, targets)
            loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        else:
            loss = self.setup.loss.given(self.model(inputs), targets)
        if is_told:
            told = {"loss": loss, "reduction": self.setup.loss.reduction}
            self.recorder.batch(ids=rows, **(told if self._tells_loss else {}))
        return torch.div(loss, divided_by)

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def forget(self) -> None:
        """Take what was seen last for what never counts."""
        self.counted = []

    def _note_update(self) -> None:
        self.steps.append(self.counted)
        self.counted = []
        named = self.model.named_parameters()
        found = {n: self.loss_scale * p.grad for n, p in named if p.grad is not None}
        self.gradients.append(found)


def notes(run: sonde.Run, event: str) -> Iterator[dict[str, Any]]:
    """Yield the notes of one kind in a log."""
    yield from (note for note in run.notes if note["event"] == event)
