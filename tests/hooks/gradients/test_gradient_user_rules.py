"""Rules of users for layers that cannot be seen from outside."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sonde
from sonde.hooks.gradients.rules import user as module_rules

from .gradient_loop import assert_same_gradients, check_exact, loop_gradients, targets_of


class Squares(torch.autograd.Function):
    """x ↦ (w x)², which no transformation sees through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return (x * weight) ** 2

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return delta * 2 * x * weight**2, (delta * 2 * x**2 * weight).flatten(0, -2).sum(0)


class Own(nn.Module):
    """A layer with an autograd function of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return Squares.apply(x, self.weight)  # type: ignore[no-any-return] # torch's own


class Derived(Own):
    pass


class Pair(nn.Module):
    """A layer that returns two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x * self.weight, x


@pytest.fixture(autouse=True)
def _only_own_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_rules, "_rules", {})


def exact_rule(module: Own, x: Tensor, delta: Tensor) -> Mapping[str, Tensor]:
    gradients = delta * 2 * x**2 * module.weight
    return {"weight": gradients.reshape(len(x), -1, 4).sum(1)}


def net(kind: type[nn.Module] = Own) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), kind(), nn.Linear(4, 2)).double()


@pytest.mark.parametrize("kind", [Own, Derived])
def test_a_rule_is_exact_for_its_layer_and_subclasses(kind: type[nn.Module]) -> None:
    sonde.gradient_rule(Own)(exact_rule)
    check_exact(net(kind), torch.randn(6, 5, 3), batch_size=4)


def test_a_layer_that_is_called_twice_has_the_sum() -> None:
    sonde.gradient_rule(Own)(exact_rule)
    own = Own()
    check_exact(nn.Sequential(nn.Linear(3, 4), own, nn.Tanh(), own), torch.randn(6, 3))


def test_a_rule_of_a_subclass_goes_first() -> None:
    def wrong(module: Own, x: Tensor, delta: Tensor) -> Mapping[str, Tensor]:
        raise AssertionError("the rule of the base was asked")

    sonde.gradient_rule(Own)(wrong)
    sonde.gradient_rule(Derived)(exact_rule)
    check_exact(net(Derived), torch.randn(6, 3))


def test_without_a_rule_the_function_is_named_and_examples_are_evaluated_alone() -> None:
    inputs, model = torch.randn(6, 3, dtype=torch.float64), net()
    targets = targets_of(model, inputs)
    result = sonde.example_gradients(model, F.mse_loss, inputs, targets, store=sonde.Full())
    reason = (
        "fallback: one example after the other, because it is behind the autograd function "
        "Squares, for which `sonde.gradient_rule` takes a rule; torch.func fails: "
    )
    assert result.coverage["1.weight"].startswith(reason)
    assert result.coverage["0.weight"] == "exact"
    assert_same_gradients(result, loop_gradients(model, F.mse_loss, inputs, targets))


def raising(module: Own, x: Tensor, delta: Tensor) -> Mapping[str, Tensor]:
    raise ValueError("two\nlines")


# An Any, as some are no rules.
RULES: dict[str, tuple[Any, str]] = {
    "wrong shape": (
        lambda module, x, delta: {"weight": delta.sum(0)},
        r"its rule gives [4]; expected [6, 4]",
    ),
    "wrong values": (
        lambda module, x, delta: {"weight": delta},
        "the gradient of one example alone differs",
    ),
    "another name": (
        lambda module, x, delta: {"scale": delta},
        "its rule gives ['scale'], not 'weight'",
    ),
    "no mapping": (lambda module, x, delta: delta, "its rule gives Tensor, not a mapping"),
    "no tensor": (
        lambda module, x, delta: {"weight": None},
        "its rule gives NoneType; expected [6, 4]",
    ),
    "an error": (raising, "Scaled fails: ValueError: two"),
}


class Scaled(nn.Module):
    """What `Own` does, by functions of torch, so that there is a fallback."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.weight) ** 2


@pytest.mark.parametrize("name", RULES)
def test_a_wrong_rule_is_named_and_falls_back(name: str) -> None:
    rule, reason = RULES[name]
    sonde.gradient_rule(Scaled)(rule)
    model, inputs = net(Scaled), torch.randn(6, 3, dtype=torch.float64)
    targets = targets_of(model, inputs)
    result = sonde.example_gradients(model, F.mse_loss, inputs, targets, store=sonde.Full())
    assert result.coverage["1.weight"].startswith(f"fallback: {reason}")
    assert_same_gradients(result, loop_gradients(model, F.mse_loss, inputs, targets))


def test_a_layer_that_returns_several_tensors_is_named() -> None:
    sonde.gradient_rule(Pair)(exact_rule)

    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pair = Pair()

        def forward(self, x: Tensor) -> Tensor:
            return torch.as_tensor(self.pair(x)[0])

    inputs = torch.randn(6, 4)
    result = sonde.example_gradients(First(), F.mse_loss, inputs, inputs)
    reason = "fallback: the input or output of Pair is not a tensor"
    assert result.coverage["pair.weight"] == reason


@pytest.mark.parametrize("kind", [3, int, "Linear"])
def test_a_rule_is_for_a_type_of_module(kind: Any) -> None:
    with pytest.raises(sonde.SondeError, match="must be a type of module"):
        sonde.gradient_rule(kind)
