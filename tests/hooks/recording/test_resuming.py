"""A training that goes on from a checkpoint: its log is that of one that was never interrupted."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import sonde
from sonde.exceptions import InvalidInputError
from tests.hooks.conftest import ConvNet, everything, train
from tests.hooks.gradients.live_loop import Net, activations, batches, plain_loop, record


def resumable(
    path: Path, images: Tensor, classes: Tensor, num_steps: int, checkpoint: dict[str, Any] | None
) -> list[dict[str, Any]]:
    """Train up to `num_steps`, from a checkpoint or from scratch; return a checkpoint a step."""
    torch.manual_seed(0)
    model = ConvNet()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    recorder = sonde.Recorder(
        path,
        model,
        everything(images, classes),
        when=sonde.every(2) | sonde.epochs(1),
        steps_per_epoch=3,
        resume=True,
    ).attach(optimizer)
    if checkpoint is not None:
        saved = copy.deepcopy(checkpoint)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["rng"])
        recorder.load_state_dict(saved["recorder"])
    checkpoints = []

    def keep(step: int) -> None:
        state = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "recorder": recorder.state_dict(),
        }
        checkpoints.append(copy.deepcopy(state))

    train(
        model,
        optimizer,
        images,
        classes,
        num_steps=num_steps - recorder.num_steps,
        after_step=keep,
    )
    recorder.close()
    return checkpoints


@pytest.mark.parametrize("at", [1, 3, 4])
def test_a_resumed_training_leaves_the_log_of_an_uninterrupted_one(
    tmp_path: Path, images: Tensor, classes: Tensor, at: int
) -> None:
    resumable(tmp_path / "whole", images, classes, 9, None)
    checkpoints = resumable(tmp_path / "cut", images, classes, 5, None)
    again = resumable(tmp_path / "cut", images, classes, 7, checkpoints[at - 1])
    resumable(tmp_path / "cut", images, classes, 9, again[-2])
    whole, cut = sonde.open_run(tmp_path / "whole"), sonde.open_run(tmp_path / "cut")
    assert [a["attempt"] for a in cut.attempts] == [0, 1, 2]
    for measure in whole.measures:
        assert cut.steps(measure) == whole.steps(measure)
        for layer, field in whole[measure].streams:
            for step in whole[measure].steps_of(field, layer):
                expected = whole[measure].array(field, step, layer)
                assert np.array_equal(cut[measure].array(field, step, layer), expected)


def test_an_attempt_that_recorded_nothing_supersedes_nothing(
    tmp_path: Path, images: Tensor, classes: Tensor
) -> None:
    resumable(tmp_path / "run", images, classes, 4, None)
    probe = everything(images, classes)
    sonde.Recorder(tmp_path / "run", ConvNet(), probe, resume=True).close()
    assert sonde.open_run(tmp_path / "run").steps() == [0, 2, 3, 4]


def test_an_attempt_says_where_it_goes_on_as_soon_as_it_knows(
    tmp_path: Path, images: Tensor, classes: Tensor
) -> None:
    def stated(*, load: bool = False, measure: bool = False) -> int | None:
        recorder = sonde.Recorder(
            tmp_path / "run", ConvNet(), everything(images, classes), resume=True
        )
        if load:
            recorder.load_state_dict({"version": 1, "num_steps": 3, "num_epochs": 1})
        if measure:
            recorder.measure()
        recorder.close()
        step: int | None = sonde.open_run(tmp_path / "run").attempts[-1]["resume_step"]
        return step

    assert stated() is None
    assert stated(measure=True) == 0
    assert stated(load=True) == 4
    assert stated(load=True, measure=True) == 4


def test_a_resumed_training_records_the_step_of_its_checkpoint(tmp_path: Path) -> None:
    model, data = Net(), batches(4)
    state: dict[str, Any] = {}

    def first(recorder: sonde.Recorder, optimizer: torch.optim.Optimizer) -> None:
        plain_loop(model, data[:2])(recorder, optimizer)
        state.update(recorder.state_dict())

    def second(recorder: sonde.Recorder, optimizer: torch.optim.Optimizer) -> None:
        recorder.load_state_dict(state)
        plain_loop(model, data[2:])(recorder, optimizer)

    record(tmp_path, model, [activations()], first)
    run = record(tmp_path, model, [activations()], second, resume=True)
    assert run.steps("activations") == [0, 1, 2, 3]


def test_a_state_of_the_end_of_an_epoch_begins_what_an_epoch_begins(tmp_path: Path) -> None:
    model, data = Net(), batches(2)
    state: dict[str, object] = {}

    def first(recorder: sonde.Recorder, optimizer: torch.optim.Optimizer) -> None:
        recorder.log(loss=torch.tensor(0.5), name="text")
        plain_loop(model, data[:1])(recorder, optimizer)
        recorder.epoch()
        state.update(recorder.state_dict())

    def second(recorder: sonde.Recorder, optimizer: torch.optim.Optimizer) -> None:
        recorder.load_state_dict(state)
        plain_loop(model, data[1:])(recorder, optimizer)

    measures = [activations(), sonde.Scalars(when=sonde.at(2))]
    record(tmp_path, model, measures, first, when=sonde.epochs(1))
    run = record(tmp_path, model, measures, second, when=sonde.epochs(1), resume=True)
    assert run.steps("activations") == [0, 1]
    # What was logged before the checkpoint is the latest value after it.
    assert run["scalars"].array("loss", 2) == 0.5


def test_a_state_is_given_without_waiting_for_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = sonde.Recorder(tmp_path / "run", Net(), [sonde.Scalars()])
    monkeypatch.setattr(recorder, "sync", lambda: pytest.fail("it waits"))
    assert recorder.state_dict(sync=False)["num_steps"] == 0
    recorder.close()


def test_an_epoch_that_ends_after_a_checkpoint_records_only_what_it_makes_due(
    tmp_path: Path,
) -> None:
    model, data = Net(), batches(1)
    state: dict[str, object] = {}

    def first(recorder: sonde.Recorder, optimizer: torch.optim.Optimizer) -> None:
        plain_loop(model, data)(recorder, optimizer)
        state.update(recorder.state_dict())
        recorder.epoch()

    def second(recorder: sonde.Recorder, optimizer: torch.optim.Optimizer) -> None:
        recorder.load_state_dict(state)
        optimizer.param_groups[0]["lr"] = 0.5
        recorder.epoch()

    probe = sonde.Probe(data[0].inputs)
    measures = [sonde.Scalars(), sonde.Predictions(probe, when=sonde.epochs(1))]
    record(tmp_path, model, measures, first)
    run = record(tmp_path, model, measures, second, resume=True)
    assert run["scalars"].array("learning_rate", 1) == 0.1
    assert run.steps("predictions") == [0, 1]


def test_a_state_that_cannot_be_loaded_is_refused(tmp_path: Path, images: Tensor) -> None:
    measure = sonde.Predictions(sonde.Probe(images))
    recorder = sonde.Recorder(tmp_path / "run", nn.Flatten(), [measure])
    with pytest.raises(InvalidInputError, match=r"expected what recorder\.state_dict"):
        recorder.load_state_dict({"step": 3})
    state = recorder.state_dict()
    recorder.measure()
    with pytest.raises(InvalidInputError, match="recording has begun already"):
        recorder.load_state_dict(state)
    recorder.close()
