"""The ways in which passes of a training come to count, or do not."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import sonde

from .cases import Setup
from .trainings import NUM_STEPS, Trained, Training


def plainly(training: Training) -> None:
    for step in range(NUM_STEPS):
        training.forward(training.batch(step)).backward()
        training.update()


def by_micro_batches(training: Training) -> None:
    for step in range(NUM_STEPS):
        for rows in training.batch(step).split([5, 3]):
            training.forward(rows, divided_by=2).backward()
        training.update()


def with_skipped_steps(training: Training) -> None:
    """A scaler skips the first step, and one between, whose gradients overflow."""
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for step in range(2 * NUM_STEPS):
        overflows = step % 2 == 0
        loss = scaler.scale(training.forward(training.batch(step // 2 + overflows)))
        (loss * torch.inf if overflows else loss).backward()
        if overflows:
            training.forget()
        training.loss_scale = scaler.get_scale()
        scaler.step(training.optimizer)
        scaler.update()
        training.optimizer.zero_grad()


def with_zeroed_gradients(training: Training) -> None:
    """Before each step, and after it, another network is trained through the model."""

    def in_vain(step: int) -> None:
        counted, training.counted = training.counted, []
        training.forward(training.batch(step + 1)[:6], is_told=False).backward()
        training.counted = counted
        training.optimizer.zero_grad()

    for step in range(NUM_STEPS):
        in_vain(step)
        training.forward(training.batch(step)).backward()
        training.update()
        in_vain(step)


def by_sam(training: Training) -> None:
    """The gradient of a first pass moves the weights; that of a second one, there, updates them."""
    for step in range(NUM_STEPS):
        training.forward(training.batch(step)).backward()
        training.forget()
        before = [p.detach().clone() for p in training.model.parameters()]
        with torch.no_grad():
            for parameter in training.model.parameters():
                assert parameter.grad is not None
                parameter.add_(0.3 * parameter.grad)
        training.optimizer.zero_grad()
        training.forward(training.batch(step)).backward()
        with torch.no_grad():
            for parameter, value in zip(training.model.parameters(), before, strict=True):
                parameter.copy_(value)
        training.update()


def beside_another_recorder(training: Training) -> None:
    """Another recorder evaluates a probe of its own on the same model in each step."""
    setup = training.setup
    inputs: Any = (setup.inputs, setup.targets) if setup.returns_loss else setup.inputs
    probe = sonde.Probe(inputs, None if setup.returns_loss else setup.targets)
    measures = [
        sonde.Activations(probe),
        sonde.ExampleGradients(probe, None if setup.returns_loss else setup.loss.given),
        sonde.Activations(sonde.TRAINING),
    ]
    path = training.recorder.path.with_name("other")
    with sonde.Recorder(path, setup.model, measures, when=sonde.every(1)) as other:
        other.attach(training.optimizer)
        plainly(training)


def in_bfloat16(training: Training) -> None:
    """As Accelerate wraps a model: its forward enters autocast, and what it returns is float32."""
    from accelerate.utils import convert_outputs_to_fp32

    forward = training.model.forward
    autocast = torch.autocast("cpu", torch.bfloat16)
    training.model.forward = convert_outputs_to_fp32(autocast(forward))
    plainly(training)


WAYS: dict[str, Callable[[Training], None]] = {
    "plainly": plainly,
    "by micro-batches": by_micro_batches,
    "with skipped steps": with_skipped_steps,
    "with zeroed gradients": with_zeroed_gradients,
    "by SAM": by_sam,
    "beside another recorder": beside_another_recorder,
    "in bfloat16": in_bfloat16,
}


def train(path: Path, setup: Setup, way: str, store: Any, *, tells_loss: bool = True) -> Trained:
    """Train in one of the ways, and read what was recorded."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        training = Training(path, setup, store, tells_loss=tells_loss)
        WAYS[way](training)
        training.recorder.close()
    said = [str(one.message) for one in caught]
    return Trained(sonde.open_run(path), training.steps, training.gradients, said)
