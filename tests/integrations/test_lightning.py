"""Trainings of Lightning's `Trainer`, recorded by its callback."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import sonde
from sonde.exceptions import SondeWarning
from sonde.integrations.lightning import SondeCallback

from .lightning_trainings import Loader, Module, in_band_callback, order, quiet, train
from .outcomes import assert_gradients, assert_recorded_every_batch, assert_same_training, state_of
from .trainings import alone, data, measures

pytestmark = quiet


@pytest.mark.parametrize(
    ("options", "num_steps"),
    [
        ({}, 12),
        ({"accumulate_grad_batches": 4}, 4),
        ({"precision": "bf16-mixed"}, 12),
        ({"half": True}, 12),
        ({"gradient_clip_val": 0.1}, 12),
        ({"validate": True, "val_check_interval": 2}, 12),
        ({"module": "part"}, 12),
    ],
    ids=["plain", "accumulated", "bf16", "fp16", "clipped", "validated", "part"],
)
def test_training_is_bit_identical_with_and_without_the_callback(
    tmp_path: Path, options: dict[str, Any], num_steps: int
) -> None:
    def module() -> Module:
        return Module(calls="a part" if options.get("module") else "itself")

    plain = train(tmp_path, **{**options, "module": module()})
    expected = state_of(plain)
    recorded = train(
        tmp_path, in_band_callback(tmp_path / "run"), **{**options, "module": module()}
    )
    assert_same_training(state_of(recorded), expected)
    assert recorded.losses == plain.losses
    # Neither a validation nor the sanity check is taken for the training.
    assert_recorded_every_batch(tmp_path / "run", num_steps)
    run = sonde.open_run(tmp_path / "run")
    assert run.state == "finished"
    assert len(run.layers) == 5


def test_training_is_bit_identical_with_a_probe(tmp_path: Path) -> None:
    plain = train(tmp_path)
    expected = state_of(plain)
    callback = SondeCallback(
        tmp_path / "run", measures=measures(), when=sonde.every(1), on_error="raise"
    )
    recorded = train(tmp_path, callback)
    assert_same_training(state_of(recorded), expected)
    assert recorded.losses == plain.losses
    run = sonde.open_run(tmp_path / "run")
    assert run.steps("example_gradients") == list(range(13))
    assert run.steps("activations", source="probe") == [0, 6, 12]


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [({}, 1e-4), ({"precision": "bf16-mixed"}, 3e-2), ({"half": True}, 1e-2)],
)
def test_gradients_in_band_are_those_of_each_example_alone(
    tmp_path: Path, options: dict[str, Any], tolerance: float
) -> None:
    module = Module(smooth=True)
    inputs, classes = data()
    expected = alone(module.body, module.body[0], inputs[order()], classes[order()])
    measure = sonde.OutputGradients(sonde.TRAINING, "body.0", sonde.Full())
    callback = in_band_callback(tmp_path / "run", measures=[measure])
    # The last micro-batch is the one that is computed inside the optimizer's step.
    train(
        tmp_path,
        callback,
        module=module,
        max_epochs=1,
        accumulate_grad_batches=6,
        **options,
    )
    ids = (order() + 100).tolist()
    assert_gradients(tmp_path / "run", "body.0", expected, tolerance, ids)
    log = sonde.open_run(tmp_path / "run")["output_gradients"]
    assert log.attributes(0)["micro_batches"] == [4, 4, 4, 4, 4, 2]


def test_ids_may_be_at_a_position_of_the_batch(tmp_path: Path) -> None:
    train(tmp_path, in_band_callback(tmp_path / "run", id_key=2), loader=Loader(as_tuples=True))
    ids = sonde.open_run(tmp_path / "run").activations.ids_at(0)
    assert ids is not None
    assert ids.tolist() == (order()[:4] + 100).tolist()


def test_without_a_reduction_gradients_keep_their_scale(tmp_path: Path) -> None:
    train(tmp_path, in_band_callback(tmp_path / "run", reduction=None))
    log = sonde.open_run(tmp_path / "run")["output_gradients"]
    assert log.attributes(0)["scale"].startswith("unknown")


@pytest.mark.parametrize("half", [False, True])
def test_the_loss_and_what_the_module_logs_are_recorded(tmp_path: Path, half: bool) -> None:
    callback = in_band_callback(tmp_path / "run", measures=[sonde.Scalars()])
    module = train(tmp_path, callback, validate=True, accumulate_grad_batches=2, half=half)
    log = sonde.open_run(tmp_path / "run")["scalars"]
    for step in range(1, 7):  # The loss of the latest micro-batch before the step.
        assert log.array("loss", step) == pytest.approx(module.losses[2 * step - 1], rel=1e-3)
    assert log.steps_of("val_loss", None) == [4, 5, 6]
    assert log.array("learning_rate", 2) == 0.01


@pytest.fixture
def of_one_process() -> Iterator[str]:
    """A strategy that wraps the model; what Lightning leaves of it is cleared away."""
    environment = dict(os.environ)
    yield "ddp"
    torch.distributed.destroy_process_group()
    os.environ.clear()
    os.environ.update(environment)


def test_under_a_wrapper_that_redirects_the_forward_the_step_runs_once(
    tmp_path: Path, of_one_process: str
) -> None:
    options: dict[str, Any] = {"strategy": of_one_process}
    plain = train(tmp_path, **options)
    expected = state_of(plain)
    with pytest.warns(SondeWarning, match="its forward was replaced"):
        recorded = train(tmp_path, in_band_callback(tmp_path / "run"), **options)
    assert_same_training(state_of(recorded), expected)
    assert recorded.losses == plain.losses
    run = sonde.open_run(tmp_path / "run")
    assert run.layers == ["body.0", "body.1", "body.2", "body.3", "body.4"]
    assert run.activations.ids_at(11) is not None
