"""What has to hold of a recorded training, whichever trainer it is: weights, gradients, log."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

import sonde

from .trainings import data


def state_of(model: nn.Module) -> dict[str, npt.NDArray[Any]]:
    """All that a training changes: weights, buffers, and where the random numbers are."""
    state = {name: tensor.detach().clone().numpy() for name, tensor in model.state_dict().items()}
    state["torch random state"] = torch.get_rng_state().numpy()
    state["numpy random state"] = np.random.get_state(legacy=False)["state"]["key"]
    state["python random state"] = np.asarray(random.getstate()[1])
    return state


def assert_same_training(
    first: dict[str, npt.NDArray[Any]], second: dict[str, npt.NDArray[Any]]
) -> None:
    """Two trainings have ended in the same bits."""
    assert first.keys() == second.keys()
    assert [name for name in first if not np.array_equal(first[name], second[name])] == []


def assert_same_log(path: Path, other_path: Path, measures: Sequence[str] = ()) -> None:
    """Two runs hold the same records, by value."""
    run, other = sonde.open_run(path), sonde.open_run(other_path)
    assert run.measures == other.measures
    assert set(measures) <= set(run.measures)
    for measure in run.measures:
        assert run.sources(measure) == other.sources(measure)
        for source in run.sources(measure):
            log, other_log = run[measure, source], other[measure, source]
            assert (measure, log.steps) == (measure, other_log.steps)
            assert log.streams == other_log.streams
            for layer, field in log.streams:
                for step in log.steps_of(field, layer):
                    np.testing.assert_array_equal(
                        log.array(field, step, layer),
                        other_log.array(field, step, layer),
                        f"{measure} of {source} at step {step}: {layer}.{field}",
                    )


def assert_recorded_every_batch(path: Path, num_steps: int) -> None:
    """Both epochs are recorded at every step, and nothing is that is not of the training."""
    run = sonde.open_run(path)
    assert run.steps("activations") == list(range(num_steps))
    sizes = [run.activations.attributes(step)["micro_batches"] for step in range(num_steps)]
    assert [size for step in sizes for size in step] == [4, 4, 4, 4, 4, 2] * 2


def assert_gradients(
    path: Path, layer: str, expected: Tensor, tolerance: float, ids: Sequence[int]
) -> None:
    """The gradients of step 0 are these, up to a part of the largest one, and of these examples."""
    log = sonde.open_run(path)["output_gradients"]
    difference = np.abs(log[layer].features(0) - expected.numpy())
    assert difference.max() < tolerance * expected.abs().max()
    found = log.ids_at(0)
    assert found is not None
    assert found.tolist() == list(ids)


def assert_resumes(
    folder: Path,
    at: int,
    train: Callable[[Path, Sequence[sonde.hooks.Measure], int | None], nn.Module],
    *,
    probe: sonde.Probe | None = None,
    predicted: Sequence[int] = (0, 6, 12),
) -> None:
    """A training that was cut and resumed ends as one that was not, and leaves the same log.

    Args:
        folder: An empty folder.
        at: The step of the checkpoint to go on from.
        train: Trains two epochs, as (a folder for `run` and checkpoints, what to record, the step
            to go on from, if any).
        probe: What predictions are made of at the end of each epoch.
        predicted: The steps at which they are.
    """
    x, y = data()
    in_all: list[sonde.hooks.Measure] = [
        sonde.Activations(sonde.TRAINING, when=sonde.epochs(1) | sonde.every(5)),
        sonde.OutputGradients(sonde.TRAINING, "*0"),
        sonde.Scalars(),
        sonde.Predictions(probe or sonde.Probe(x[:5], y[:5]), when=sonde.epochs(1)),
    ]
    expected = state_of(train(folder / "whole", in_all, None))
    train(folder / "cut", in_all, None)
    assert_same_training(state_of(train(folder / "cut", in_all, at)), expected)
    assert_same_log(folder / "cut/run", folder / "whole/run", ["scalars", "activations"])
    run = sonde.open_run(folder / "cut/run")
    assert [attempt["resume_step"] for attempt in run.attempts] == [0, at + 1]
    assert run.steps("predictions") == list(predicted)


def assert_closed(
    path: Path, num_steps: int, model: nn.Module, state: str = "ended by RuntimeError"
) -> None:
    """A run is closed after an error, and the model is free of hooks."""
    run = sonde.open_run(path)
    assert (run.state, run.steps("activations")) == (state, list(range(num_steps)))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
