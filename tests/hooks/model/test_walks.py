"""Walks go over a model as PyTorch's own do."""

from __future__ import annotations

from torch import nn

from sonde.hooks.model.walks import modules_of, parameters_of


def make_model() -> nn.Sequential:
    """Return a model with a shared layer, a layer within layers, and a child that is None."""
    shared = nn.Linear(2, 2)
    model = nn.Sequential(nn.Sequential(shared, nn.Sequential(nn.ReLU())), nn.Linear(2, 2), shared)
    model.register_module("absent", None)
    model[1].register_parameter("none", None)
    return model


def test_modules_are_those_of_the_model_in_its_order() -> None:
    model = make_model()

    assert modules_of(model) == list(model.modules())


def test_parameters_are_those_of_the_model_and_tied_ones_stand_at_each_place() -> None:
    model = make_model()
    assert list(map(id, parameters_of(model))) == list(map(id, model.parameters()))

    model[1].weight = model[2].weight

    ids = list(map(id, parameters_of(model)))
    assert list(dict.fromkeys(ids)) == list(map(id, model.parameters()))
    assert ids.count(id(model[2].weight)) == 2
