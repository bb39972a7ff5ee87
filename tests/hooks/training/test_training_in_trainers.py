"""The training as a source where a trainer runs it: closures, divided losses, other forwards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import sonde
from tests.hooks.gradients.live_loop import (
    NUM_EXAMPLES,
    Batch,
    Net,
    activations,
    alone,
    batches,
    features,
    gradients,
    plain_loop,
    record,
)


def test_a_probe_whose_gradients_are_taken_is_not_taken_for_the_training(tmp_path: Path) -> None:
    model, data = Net().eval(), batches(2)
    probe = sonde.Probe(data[0].inputs[:3], data[0].targets[:3])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(data[1].inputs), data[1].targets)
        loss.backward()
        return loss

    measures = [
        sonde.ExampleGradients(probe, F.cross_entropy, when=sonde.epochs(1)),
        gradients("3"),
    ]
    with sonde.Recorder(
        tmp_path / "run", model, measures, when=sonde.every(1), on_error="raise"
    ) as recorder:
        recorder.attach(optimizer)
        for _ in range(2):
            optimizer.step(closure)
            recorder.epoch()  # The next step is observed already.
    run = sonde.open_run(tmp_path / "run")
    assert run.steps("example_gradients") == [0, 1, 2]
    for step in range(2):
        assert run["output_gradients"].attributes(step)["micro_batches"] == [NUM_EXAMPLES]


def test_a_closure_is_the_last_of_accumulated_micro_batches(tmp_path: Path) -> None:
    model, data = Net().eval(), batches(3)

    def loop(recorder: sonde.Recorder, optimizer: torch.optim.Optimizer) -> None:
        def closure(batch: Batch = data[2]) -> float:
            loss = F.cross_entropy(model(batch.inputs), batch.targets)
            recorder.batch(batch.ids, loss=loss)
            (loss / 3).backward()
            return loss.item()

        for batch in data[:2]:
            closure(batch)
        optimizer.step(closure)
        for batch in data[:2]:
            closure(batch)
        optimizer.step(closure=closure)

    expected = torch.cat([alone(model, "3", batch) for batch in data])
    run = record(tmp_path, model, [gradients("3")], loop)
    assert run.steps("output_gradients") == [0, 1]
    np.testing.assert_allclose(features(run, "output_gradients", "3", 0), expected, rtol=1e-4)
    for step in range(2):
        assert run["output_gradients"].attributes(step)["micro_batches"] == [NUM_EXAMPLES] * 3


def test_a_loss_told_after_the_ids_brings_its_reduction(tmp_path: Path) -> None:
    model, data = Net().eval(), batches(1)
    expected = alone(model, "3", data[0])

    def loop(recorder: sonde.Recorder, optimizer: torch.optim.Optimizer) -> None:
        with recorder.batch(ids=data[0].ids):
            loss = F.cross_entropy(model(data[0].inputs), data[0].targets, reduction="sum")
            recorder.batch(loss=loss, reduction="sum")
            loss.backward()
        optimizer.step()

    run = record(tmp_path, model, [gradients("3")], loop)
    np.testing.assert_allclose(features(run, "output_gradients", "3"), expected, rtol=1e-4)


def test_what_a_loss_was_divided_by_before_it_was_told_is_divided_out(tmp_path: Path) -> None:
    model, data = Net().eval(), batches(2)
    expected = torch.cat([alone(model, "3", batch) for batch in data])

    def loop(recorder: sonde.Recorder, optimizer: torch.optim.Optimizer) -> None:
        for batch in data:
            loss = F.cross_entropy(model(batch.inputs), batch.targets) / 2
            recorder.batch(loss=loss, divided_by=2)
            (loss * 8).backward()
        optimizer.step()

    run = record(tmp_path, model, [gradients("3")], loop)
    np.testing.assert_allclose(features(run, "output_gradients", "3"), expected, rtol=1e-4)


def test_a_forward_that_is_replaced_for_a_while_is_not_run_to_find_the_batch_axis(
    tmp_path: Path,
) -> None:
    model, data = Net().eval(), batches(1)
    sizes: list[int] = []
    own: Callable[[Tensor], Tensor] = model.forward

    def loop(recorder: sonde.Recorder, optimizer: torch.optim.Optimizer) -> None:
        def replaced(inputs: Tensor) -> Tensor:
            sizes.append(len(inputs))
            return own(inputs)

        model.forward = replaced  # type: ignore[method-assign]  # As trainers do.
        plain_loop(model, data)(recorder, optimizer)

    with pytest.warns(UserWarning, match="its forward was replaced by another function"):
        run = record(tmp_path, model, [activations("3")], loop)
    assert sizes == [NUM_EXAMPLES]
    assert run.activations.layers == ["3"]
