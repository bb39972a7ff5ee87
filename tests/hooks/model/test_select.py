from __future__ import annotations

from typing import cast

import pytest
import torch
from torch import nn

from sonde.exceptions import LayerNotFoundError, UnsupportedModelError
from sonde.hooks import layers_of, select_layers


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.module = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self.module(self.second(self.first(x))))


def compiled(model: nn.Module) -> nn.Module:
    return cast(nn.Module, torch.compile(model))


@pytest.fixture
def model() -> nn.Module:
    return nn.Sequential(Block(), nn.Tanh(), Block())


def test_leaves_are_the_default(model: nn.Module) -> None:
    assert list(select_layers(model)) == [
        "0.first",
        "0.second",
        "0.module",
        "1",
        "2.first",
        "2.second",
        "2.module",
    ]


def test_globs_types_and_predicates_add_up(model: nn.Module) -> None:
    taken = select_layers(model, ["2.f*", nn.Tanh, lambda name, _: name == "0"])
    assert list(taken) == ["0", "1", "2.first"]


def test_a_minus_takes_layers_out_again(model: nn.Module) -> None:
    assert list(select_layers(model, "-*.second")) == [
        "0.first", "0.module", "1", "2.first", "2.module"
    ]  # fmt: skip
    assert list(select_layers(model, ["-0*", nn.Linear, nn.Tanh])) == ["1", "2.first", "2.second"]


def test_an_exclusion_that_matches_nothing_is_an_error(model: nn.Module) -> None:
    with pytest.raises(LayerNotFoundError, match=r"no layer matches '0\.frist'; near: 0\.first"):
        select_layers(model, ["-0.frist"])


def test_an_exclusion_of_everything_is_an_error(model: nn.Module) -> None:
    with pytest.raises(LayerNotFoundError, match=r"-1, -\*first takes out every layer that was"):
        select_layers(model, ["1", "*first", "-1", "-*first"])


def test_a_compiled_model_keeps_its_names(model: nn.Module) -> None:
    assert list(layers_of(compiled(model))) == list(layers_of(model))


def test_a_users_own_child_called_module_keeps_its_name(model: nn.Module) -> None:
    assert "0.module" in layers_of(model)


def test_a_wrapped_layer_inside_keeps_its_name() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1] = compiled(model[1])
    assert list(layers_of(model)) == ["", "0", "1"]


def test_a_shared_module_is_listed_once() -> None:
    shared = nn.Linear(2, 2)
    assert list(select_layers(nn.Sequential(shared, nn.ReLU(), shared))) == ["0", "1"]


def test_an_empty_glob_lists_near_names(model: nn.Module) -> None:
    with pytest.raises(LayerNotFoundError, match=r"no layer matches '0\.frist'; near: 0\.first"):
        select_layers(model, ["0.frist"])


def test_an_empty_type_lists_what_the_model_has(model: nn.Module) -> None:
    with pytest.raises(LayerNotFoundError, match=r"taken by Conv2d; the model has: Sequential"):
        select_layers(model, [nn.Conv2d])


def test_data_parallel_is_refused_by_name(model: nn.Module) -> None:
    with pytest.raises(UnsupportedModelError, match=r"nn\.DataParallel copies the model"):
        layers_of(nn.DataParallel(model))


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
def test_script_modules_are_refused_by_name() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(UnsupportedModelError, match="is a ScriptModule"):
        layers_of(scripted)


def test_attention_stands_for_the_child_it_never_calls() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16)
    names = list(select_layers(model))
    assert names[:2] == ["self_attn", "linear1"]
    assert list(select_layers(nn.MultiheadAttention(8, 2))) == [""]
    assert list(select_layers(model, "self_attn.*")) == ["self_attn.out_proj"]
