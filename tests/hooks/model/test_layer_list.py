"""The list of layers: what a selector takes, with shapes, and no trace left in the model."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import sonde
from sonde.exceptions import LayerNotFoundError
from tests.hooks.conftest import ConvNet


class Twice(nn.Module):
    """Calls one layer twice, one never, and one that puts out a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(4, 4)
        self.unused = nn.Linear(4, 2)
        self.rnn = nn.LSTM(4, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.rnn(self.shared(self.shared(x)))[0]
        return output


def test_layers_print_as_a_table() -> None:
    assert repr(sonde.layers(Twice(), inputs=torch.zeros(5, 7, 4))).splitlines() == [
        "layer   type    parameters  output",
        "shared  Linear  20          2 × 7 × 4, #1 2 × 7 × 4",
        "unused  Linear  10          not called",
        "rnn     LSTM    108         [0] 2 × 7 × 3, [1][0] 1 × 2 × 3, [1][1] 1 × 2 × 3",
    ]


def test_layers_are_those_a_measure_records(images: Tensor) -> None:
    model = ConvNet()
    probe = sonde.Probe(images)
    listed = sonde.layers(model, ["-*1", nn.Module], inputs=probe)
    assert [layer.name for layer in listed] == [n for n, _ in model.named_modules() if n != "1"]
    subject = sonde.hooks.Subject(model)
    recorded = sonde.Activations(probe, ["-*1", nn.Module]).record(subject)
    shapes = recorded.notes["layers"]["feature_shapes"]
    assert shapes == {
        name: list(shape[1:]) for layer in listed for name, shape in (layer.outputs or {}).items()
    }


def test_without_inputs_no_shapes_are_listed_and_nothing_runs() -> None:
    listed = sonde.layers(nn.Sequential(nn.LazyLinear(3), nn.ReLU()))
    assert [layer.outputs for layer in listed] == [None, None]
    assert [layer.num_parameters for layer in listed] == [0, 0]
    assert "LazyLinear" in repr(listed)


def test_a_look_leaves_no_trace(images: Tensor) -> None:
    model = ConvNet().train()
    before, random_state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    sonde.layers(model, inputs=images)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not any(module._forward_hooks for module in model.modules())


def test_a_notebook_shows_a_table_without_markup_of_names() -> None:
    model = nn.Sequential()
    model.add_module("<b>", nn.Linear(2, 2))
    shown = sonde.layers(model)._repr_html_()
    assert shown.startswith("<table><tr><th>layer</th>")
    assert "&lt;b&gt;" in shown


def test_a_selector_that_takes_nothing_is_an_error() -> None:
    with pytest.raises(LayerNotFoundError, match="no layer matches 'fc'"):
        sonde.layers(Twice(), "fc")
