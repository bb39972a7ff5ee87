"""What the tests of trainers share: a model, data, the slow way to gradients, equal logs."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sonde

NUM_EXAMPLES = 22  # Batches of four: five whole ones, and one of two.
NUM_CLASSES = 3


def body() -> nn.Sequential:
    """BatchNorm, dropout and an in-place operation: everything that makes recording hard."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 8),
        nn.BatchNorm1d(8),
        nn.ReLU(inplace=True),
        nn.Dropout(0.3),
        nn.Linear(8, NUM_CLASSES),
    )


def smooth_body() -> nn.Sequential:
    """A body in which an example's gradient is its own, whatever the rest of the batch is."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, NUM_CLASSES))


def data() -> tuple[Tensor, Tensor]:
    """Inputs and classes."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(NUM_EXAMPLES, 6, generator=generator)
    return inputs, torch.arange(NUM_EXAMPLES) % NUM_CLASSES


def measures(*, probe: bool = True) -> list[sonde.hooks.Measure]:
    """Everything cheap: in band, out of band, by step and by epoch."""
    x, y = data()
    in_band: list[sonde.hooks.Measure] = [
        sonde.Activations(sonde.TRAINING),
        sonde.OutputGradients(sonde.TRAINING, "*0"),
        sonde.Scalars(),
    ]
    if not probe:
        return in_band
    held = sonde.Probe(x[:5], y[:5])
    return [
        *in_band,
        sonde.Activations(held, when=sonde.epochs(1)),
        sonde.ExampleGradients(held, F.cross_entropy),
    ]


def alone(model: nn.Module, layer: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Gradients of each example's own loss by a layer's output, one example at a time, in float64.

    Args:
        model: From inputs to logits.
        layer: A layer of it.
        inputs: The examples.
        targets: Their classes.
    """
    twin, of_twin = copy.deepcopy((model, layer))
    twin.double().eval()
    rows = []
    for row in range(len(inputs)):
        kept: list[Tensor] = []

        def keep(_: nn.Module, __: Any, output: Tensor, kept: list[Tensor] = kept) -> None:
            output.retain_grad()
            kept.append(output)

        handle = of_twin.register_forward_hook(keep)
        F.cross_entropy(twin(inputs[row : row + 1].double()), targets[row : row + 1]).backward()
        handle.remove()
        assert kept[0].grad is not None
        rows.append(kept[0].grad.flatten())
    return torch.stack(rows)


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
