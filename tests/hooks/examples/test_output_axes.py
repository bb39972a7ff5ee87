"""One rule for which axis of an output holds the examples, on probes, in band and in losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sonde
from sonde.exceptions import InvalidInputError, SondeWarning
from sonde.hooks.examples.axes import ExampleAxes, OutputAxes


class States(nn.Module):
    """Like the states of two layers and five heads, [2, 5, examples, features]."""

    def forward(self, x: Tensor) -> Tensor:
        factors = torch.arange(1.0, 11).reshape(2, 5, 1, 1)
        return factors * x


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.states, self.out = States(), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Any:
        return self.out(self.states(x).mean((0, 1)))


class WithStates(Net):
    def forward(self, x: Tensor) -> Any:
        states = self.states(x)
        # Beside them something without examples, whose last axis may have their number.
        return {"states": states, "scores": self.out(states.mean((0, 1))), "table": self.out.weight}


def _data(num_examples: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(num_examples, 8), torch.arange(num_examples) % 3


def _states_by_hand(x: Tensor) -> np.ndarray[Any, Any]:
    rows = [[[(5 * i + j + 1) * row for j in range(5)] for i in range(2)] for row in x.numpy()]
    return np.array(rows).reshape(len(x), -1)


@pytest.mark.parametrize(
    ("source", "num_examples"),
    [*((source, n) for source in ("probe", "training") for n in (2, 3, 5, 32)), ("probe", 1)],
)
def test_states_are_recorded_from_a_probe_and_in_band(
    tmp_path: Path, source: str, num_examples: int
) -> None:
    x, y = _data(num_examples)
    net = Net()
    examples = sonde.Probe(x) if source == "probe" else sonde.TRAINING
    measure = sonde.Activations(examples, "states", sonde.Full())
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    recorder = sonde.Recorder(tmp_path / "run", net, [measure], when=sonde.every(1))
    recorder.attach(optimizer)
    F.cross_entropy(net(x), y).backward()
    optimizer.step()
    recorder.close()
    features = sonde.open_run(tmp_path / "run")["activations"].features("states", 0)
    np.testing.assert_allclose(features.reshape(num_examples, -1), _states_by_hand(x), rtol=1e-6)


@pytest.mark.parametrize("batch_size", [2, 3, 5, 8])
def test_a_last_batch_with_the_size_of_another_axis(tmp_path: Path, batch_size: int) -> None:
    x, y = _data(7)  # Last batches of one, one, two and seven examples.
    probe = sonde.Probe(x, y, batch_size=batch_size)
    measures = [sonde.Activations(probe, "states", sonde.Full())]
    recorder = sonde.Recorder(tmp_path / "run", Net(), measures)
    recorder.measure()
    recorder.close()
    features = sonde.open_run(tmp_path / "run")["activations"].features("states", 0)
    np.testing.assert_allclose(features.reshape(7, -1), _states_by_hand(x), rtol=1e-6)


@pytest.mark.parametrize("num_examples", [2, 3, 5, 8])
def test_a_loss_sees_the_states_of_its_example_alone(num_examples: int) -> None:
    x, y = _data(num_examples)
    net = WithStates()

    def loss(outputs: dict[str, Tensor], targets: Tensor) -> Tensor:
        assert outputs["states"].shape[2] == 1
        assert outputs["table"].shape == (3, 8)
        penalty = outputs["states"].pow(2).mean() * outputs["table"].pow(2).sum()
        return F.cross_entropy(outputs["scores"], targets) + penalty

    result = sonde.example_gradients(net, loss, x, y)
    for row in range(num_examples):
        value = loss(net(x[row : row + 1]), y[row : row + 1])
        grads = torch.autograd.grad(value, list(net.parameters()))
        norm = torch.cat([g.flatten() for g in grads]).norm().double()
        torch.testing.assert_close(result.norms[row], norm, rtol=1e-4, atol=1e-6)


def test_one_example_in_band_does_not_tell_which_axis_is_its_own(tmp_path: Path) -> None:
    x, y = _data(1)
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    measure = sonde.Activations(sonde.TRAINING, "states")
    recorder = sonde.Recorder(tmp_path / "run", net, [measure]).attach(optimizer)
    F.cross_entropy(net(x), y).backward()
    with pytest.warns(SondeWarning, match=r"cannot be told whether an axis of its"):
        optimizer.step()
    recorder.close()


def test_one_tensor_whose_first_axis_alone_fits_needs_no_look() -> None:
    def look(path: str) -> list[Any]:
        raise AssertionError("the model was run")

    axes = OutputAxes(ExampleAxes(), look)
    assert axes.of("", [8, 3], 8) == 0
    assert axes.of("", [4, 3], 8) is None


def test_several_axes_of_the_same_size_are_refused_where_nothing_tells_them_apart() -> None:
    axes = OutputAxes(ExampleAxes(), lambda path: [(4, [4, 4, 3])])
    with pytest.raises(InvalidInputError, match=r"axes 0 and 1 of an output \[4, 4, 3\] have the"):
        axes.of("", [4, 4, 3], 4)
    assert axes.of("", [7, 4, 3], 7) == 0
    assert axes.of("", [4, 4, 3], 4) == 0
