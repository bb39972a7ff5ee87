"""Batches without any example: left out in band, and said; refused as a probe."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import sonde
from sonde.exceptions import InvalidInputError, SondeWarning

_SIZES = [[4], [3, 0, 4], [0], [2]]


def _train(path: Path) -> tuple[sonde.Run, list[Tensor], list[Tensor]]:
    """Record steps of micro-batches; return also the weights and all inputs of each step."""
    torch.manual_seed(0)
    net = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    measures = [
        sonde.Activations(sonde.TRAINING, store=sonde.Full()),
        sonde.OutputGradients(sonde.TRAINING, store=sonde.Full()),
        sonde.ExampleGradients(sonde.TRAINING),
    ]
    recorder = sonde.Recorder(path, net, measures, when=sonde.every(1)).attach(optimizer)
    weights, inputs = [], []
    for sizes in _SIZES:
        batches = [torch.randn(size, 4) for size in sizes]
        weights.append(torch.cat([net.weight.detach().clone(), net.bias.detach()[:, None]], 1))
        inputs.append(torch.cat(batches))
        optimizer.zero_grad()
        for x in batches:
            F.cross_entropy(net(x), torch.zeros(len(x)).long(), reduction="sum").backward()
        optimizer.step()
    recorder.close()
    return sonde.open_run(path), weights, inputs


def test_they_are_left_out_of_the_training_and_that_is_said(tmp_path: Path) -> None:
    with pytest.warns(SondeWarning) as caught:
        run, weights, inputs = _train(tmp_path / "run")
    told = " ".join(str(warning.message) for warning in caught)
    assert "passes over batches without any example are left out" in told
    assert "its batches had no example" in told
    assert "fails" not in told
    for measure in ("activations", "output_gradients", "example_gradients"):
        assert run[measure].steps == [0, 1, 3]
        assert run[measure].attributes(1)["micro_batches"] == [3, 4]
        assert run[measure].attributes(1)["empty_passes"] == 1
        assert "empty_passes" not in run[measure].attributes(0)
    for step in (0, 1, 3):
        x = torch.cat([inputs[step], torch.ones(len(inputs[step]), 1)], 1)
        logits = x @ weights[step].T
        recorded = run["activations"].features(run["activations"].layers[0], step)
        np.testing.assert_allclose(recorded, logits, rtol=1e-4, atol=1e-6)
        delta = logits.softmax(1) - F.one_hot(torch.zeros(len(x)).long(), 3)
        gram = (delta @ delta.T) * (x @ x.T)
        recorded = run["example_gradients"].array("gram_total", step)
        np.testing.assert_allclose(recorded, gram, rtol=1e-4, atol=1e-6)


def test_what_is_told_of_one_is_not_taken_for_the_next(tmp_path: Path) -> None:
    net = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    measure = sonde.Activations(sonde.TRAINING, store=sonde.Full())
    recorder = sonde.Recorder(tmp_path / "run", net, [measure]).attach(optimizer)
    for ids in ([], [7, 8]):
        with recorder.batch(ids=ids):
            net(torch.randn(len(ids), 4)).sum().backward()
    with pytest.warns(SondeWarning, match="without any example are left out"):
        optimizer.step()
    recorder.close()
    log = sonde.open_run(tmp_path / "run")["activations"]
    np.testing.assert_array_equal(log.array("id", 0), [7, 8])


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_probe_without_examples_is_refused(in_memory: bool) -> None:
    with pytest.raises(InvalidInputError, match="has no example"):
        sonde.Probe(TensorDataset(torch.zeros(0, 4), torch.zeros(0)), in_memory=in_memory)
    with pytest.raises(InvalidInputError, match="same number of examples, at least one"):
        sonde.Probe(torch.zeros(0, 4))
