"""The axis of the examples in what a training's layers put out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sonde
from tests.hooks.gradients.live_loop import NUM_EXAMPLES, features, gradients, record


def test_examples_in_axis_1_of_the_inputs(tmp_path: Path) -> None:
    class TimeFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.RNN(4, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.as_tensor(self.head(self.rnn(x)[0]).mean(0))

    model = TimeFirst()
    inputs = torch.randn(NUM_EXAMPLES, NUM_EXAMPLES, 4)  # As many steps as examples.

    def loop(recorder: sonde.Recorder, optimizer: torch.optim.Optimizer) -> None:
        F.cross_entropy(model(inputs), torch.arange(NUM_EXAMPLES) % 3).backward()
        optimizer.step()

    with torch.no_grad():
        expected = model.rnn(inputs)[0].transpose(0, 1).flatten(1)
    source = sonde.Training(batch_dim=1)
    run = record(tmp_path, model, [sonde.Activations(source, store=sonde.Full())], loop)
    np.testing.assert_array_equal(features(run, "activations", "rnn[0]", 0), expected)
    with pytest.raises(ValueError, match="the training is given in several ways"):
        sonde.Recorder(tmp_path / "b", model, [sonde.Activations(source), gradients()])


def test_a_last_batch_as_small_as_the_one_that_was_looked_at(tmp_path: Path) -> None:
    model = nn.LSTM(4, 3)  # Two time steps, and once two examples.
    head = nn.Linear(3, 3)
    whole = nn.ModuleDict({"rnn": model, "head": head})
    whole.forward = lambda x: head(model(x)[0][-1])

    def loop(recorder: sonde.Recorder, optimizer: torch.optim.Optimizer) -> None:
        for size in (NUM_EXAMPLES, 2):
            inputs = torch.randn(2, size, 4)
            F.cross_entropy(whole(inputs), torch.arange(size) % 3).backward()
            optimizer.step()

    source = sonde.Training(batch_dim=1)
    measure = sonde.Activations(source, "rnn", sonde.Full())
    expected = []
    model.register_forward_hook(lambda _, __, output: expected.append(output[0].detach().clone()))
    run = record(tmp_path, whole, [measure], loop)
    for step in range(2):
        rows = expected[step - 2].transpose(0, 1).flatten(1)
        np.testing.assert_array_equal(features(run, "activations", "rnn[0]", step), rows)
