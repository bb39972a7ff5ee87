from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

from sonde.hooks.model.taps import tapped, tensor_leaves


@dataclass
class Output:
    hidden: Tensor
    extra: dict[str, Tensor]


def calls_of(model: nn.Module, modules: dict[str, nn.Module], inputs: Tensor) -> list[str]:
    names: list[str] = []
    with tapped(modules, lambda name, *_: names.append(name)):
        model(inputs)
    return names


def test_later_calls_of_a_module_are_numbered() -> None:
    layer = nn.Linear(2, 2)
    model = nn.Sequential(layer, nn.ReLU(), layer, layer)
    assert calls_of(model, {"0": layer}, torch.ones(1, 2)) == ["0", "0#1", "0#2"]


def test_no_hook_is_left_behind() -> None:
    layer = nn.Linear(2, 2)
    calls_of(layer, {"": layer}, torch.ones(1, 2))
    assert len(layer._forward_hooks) == 0


def test_hooks_go_when_the_forward_pass_fails() -> None:
    layer = nn.Linear(2, 2)
    try:
        calls_of(layer, {"": layer}, torch.ones(1, 3))
    except RuntimeError:
        pass
    assert len(layer._forward_hooks) == 0


def test_a_tap_does_not_replace_the_output() -> None:
    layer = nn.ReLU()
    with tapped({"relu": layer}, lambda *_: None):
        assert layer(torch.tensor([-1.0, 2.0])).tolist() == [0.0, 2.0]


def test_inputs_given_by_keyword_are_seen() -> None:
    seen: list[Any] = []
    layer = nn.Linear(2, 2)
    inputs = torch.ones(1, 2)
    with tapped({"": layer}, lambda name, module, first, output: seen.append(first)):
        layer(input=inputs)
    assert seen[0] is inputs


def test_leaves_of_any_nesting_are_named_by_their_way() -> None:
    ones = torch.ones(1)
    value = (ones, [ones, {"a": ones}], Output(ones, {"b": ones}), None, 3)
    assert [name for name, _ in tensor_leaves(value)] == [
        "[0]",
        "[1][0]",
        "[1][1][a]",
        "[2][hidden]",
        "[2][extra][b]",
    ]


def test_a_single_tensor_has_no_suffix() -> None:
    assert [name for name, _ in tensor_leaves({"out": torch.ones(1)})] == [""]


def test_packed_sequences_are_padded_in_the_order_of_the_examples() -> None:
    sequences = [torch.ones(2, 1), 2 * torch.ones(3, 1)]
    packed = pack_sequence(sequences, enforce_sorted=False)
    ((suffix, padded),) = tensor_leaves(packed)
    assert suffix == ""
    assert padded[..., 0].tolist() == [[1, 1, 0], [2, 2, 2]]
