"""Measures of the training itself: what is recorded of its own forward and backward passes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sonde
from tests.hooks.gradients.live_loop import (
    NUM_EXAMPLES,
    Net,
    Seen,
    activations,
    alone,
    batches,
    features,
    gradients,
    plain_loop,
    record,
)


def test_outputs_are_those_of_the_training_with_its_dropout(tmp_path: Path) -> None:
    model, data = Net(), batches(3)
    seen = Seen(model)
    run = record(tmp_path, model, [activations()], plain_loop(model, data))
    assert run.steps("activations") == [0, 1, 2]
    assert run.layers == ["0", "1", "2", "3"]
    for step in range(3):
        for layer, outputs in seen.outputs.items():
            # The training's passes, and at first one over two examples that finds the batch axis.
            own = [output for output in outputs if len(output) == NUM_EXAMPLES]
            np.testing.assert_array_equal(features(run, "activations", layer, step), own[step])


def test_only_due_steps_are_recorded_and_leave_no_hook(tmp_path: Path) -> None:
    model, data = Net(), batches(5)
    counts = []

    def loop(recorder: sonde.Recorder, optimizer: torch.optim.Optimizer) -> None:
        for batch in data:
            counts.append(sum(len(m._forward_hooks) for m in model.modules()))
            F.cross_entropy(model(batch.inputs), batch.targets).backward()
            optimizer.step()

    run = record(tmp_path, model, [activations()], loop, when=sonde.at(1, 3))
    assert run.steps("activations") == [1, 3]
    assert [count > 0 for count in counts] == [False, True, False, True, False]
    assert all("__reduce_ex__" not in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("accumulated", [1, 3])
@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_gradients_are_those_of_each_example_alone(
    tmp_path: Path, reduction: str, accumulated: int, scale: float
) -> None:
    model, data = Net().eval(), batches(accumulated)
    expected = {
        layer: torch.cat([alone(model, layer, batch) for batch in data]) for layer in ("0", "3")
    }

    def loop(recorder: sonde.Recorder, optimizer: torch.optim.Optimizer) -> None:
        for batch in data:
            loss = F.cross_entropy(model(batch.inputs), batch.targets, reduction=reduction)
            recorder.batch(batch.ids, batch.targets, loss, reduction=reduction)  # type: ignore[arg-type]
            (loss / accumulated * scale).backward()
        optimizer.step()

    run = record(tmp_path, model, [gradients(["0", "3"])], loop)
    for layer, rows in expected.items():
        found = features(run, "output_gradients", layer, 0)
        np.testing.assert_allclose(found, rows, rtol=1e-4, atol=1e-6)
    log = run["output_gradients"]
    ids = log.ids_at(0)
    assert ids is not None
    assert ids.tolist() == torch.cat([batch.ids for batch in data]).tolist()
    assert log.attributes(0)["micro_batches"] == [NUM_EXAMPLES] * accumulated
    np.testing.assert_array_equal(log.array("target"), torch.cat([b.targets for b in data]))


def test_without_the_loss_the_scale_is_said_to_be_unknown(tmp_path: Path) -> None:
    model, data = Net().eval(), batches(1)
    expected = alone(model, "3", data[0]) / NUM_EXAMPLES
    run = record(tmp_path, model, [gradients("3")], plain_loop(model, data))
    np.testing.assert_allclose(features(run, "output_gradients", "3"), expected, rtol=1e-4)
    attributes = run["output_gradients"].attributes()
    assert attributes["scale"].startswith("unknown")
    assert attributes["ids"] == "unknown: in order of arrival"


def test_a_gradient_scaler_is_divided_out(tmp_path: Path) -> None:
    model, data = Net().eval(), batches(1)
    expected = alone(model, "0", data[0])
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)

    def loop(recorder: sonde.Recorder, optimizer: torch.optim.Optimizer) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(data[0].inputs), data[0].targets)
        recorder.batch(loss=loss)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    run = record(tmp_path, model, [gradients("0")], loop)
    found = features(run, "output_gradients", "0")
    assert np.abs(found - expected.numpy()).max() < 0.02 * expected.abs().max()


def test_half_precision_is_multiplied_in_float32(tmp_path: Path) -> None:
    model, data = Net().eval(), batches(1)
    kept: list[Tensor] = []
    model[0].register_forward_hook(lambda _, __, output: kept.append(output.detach().clone()))

    def loop(recorder: sonde.Recorder, optimizer: torch.optim.Optimizer) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            F.cross_entropy(model(data[0].inputs), data[0].targets).backward()
        optimizer.step()

    run = record(tmp_path, model, [sonde.Activations(sonde.TRAINING, "0")], loop)
    rows = kept[-1].double()
    assert kept[-1].dtype == torch.bfloat16
    np.testing.assert_allclose(run.activations["0"].gram(), rows @ rows.T, rtol=1e-6, atol=1e-6)


def test_a_probe_and_the_training_are_recorded_side_by_side(tmp_path: Path) -> None:
    model, data = Net(), batches(2)
    probe = sonde.Probe(data[0].inputs)
    run = record(
        tmp_path, model, [sonde.Activations(probe), activations()], plain_loop(model, data)
    )
    assert run.steps("activations", source="training") == [0, 1]
    assert run.steps("activations", source="probe") == [0, 1, 2]


def test_output_gradients_of_a_probe_are_refused(tmp_path: Path) -> None:
    measure = sonde.OutputGradients(sonde.Probe(torch.ones(2, 4)))
    with pytest.raises(ValueError, match=r"give sonde\.TRAINING"):
        sonde.Recorder(tmp_path / "run", Net(), [measure])


def test_a_measure_of_a_probe_is_no_pass_of_the_training(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    inputs, targets = torch.randn(7, 4), torch.arange(7) % 3
    measures = [
        sonde.Activations(sonde.TRAINING),
        sonde.ExampleGradients(sonde.Probe(inputs, targets), nn.functional.cross_entropy),
    ]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = sonde.Recorder(tmp_path / "run", model, measures, on_error="raise")
    recorder.attach(optimizer)
    recorder.measure()  # While the training is observed.
    nn.functional.cross_entropy(model(inputs[:5]), targets[:5]).backward()
    optimizer.step()
    recorder.close()
    run = sonde.open_run(tmp_path / "run")
    assert run.activations["0"].gram(step=0).shape == (5, 5)
    assert run.steps("example_gradients") == [0, 1]
