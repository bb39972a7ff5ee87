"""Rules of users for their own layers, in one function."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

from torch import Tensor, nn

from sonde.exceptions import InvalidInputError
from sonde.hooks.gradients.factors.dense import Dense, Factor

from .places import UnsupportedError, remembered

ModuleRule: TypeAlias = Callable[[Any, Tensor, Tensor], Mapping[str, Tensor]]
"""(module, inputs, output gradients) to the per-example gradients of each parameter, by name.

Inputs and output gradients have the examples on axis 0; a gradient is [examples, *parameter].
"""

_rules: dict[type[nn.Module], ModuleRule] = {}


def gradient_rule(kind: type[nn.Module]) -> Callable[[ModuleRule], ModuleRule]:
    """Register a rule for the per-example gradients of a layer of one's own.

    It is for what cannot be seen from outside, such as a layer that calls an autograd function with
    its parameters; what is written with functions of torch needs none. Each call of the layer with
    one tensor, that returns one, is given to it. As for every parameter, the gradients are checked
    once against those of examples run alone.

    Args:
        kind: The type of the layer; subclasses are meant too, unless they have their own rule.

    Returns:
        A decorator for the rule, a function of (module, inputs, output gradients) that returns the
        per-example gradients of the module's parameters by name, each [examples, *parameter].

    Raises:
        InvalidInputError: If it is no module type.
    """
    if not isinstance(kind, type) or not issubclass(kind, nn.Module):
        raise InvalidInputError(f"`kind` (={kind!r}) must be a type of module")

    def register(rule: ModuleRule) -> ModuleRule:
        _rules[kind] = rule
        return rule

    return register


def rule_for(module: nn.Module) -> ModuleRule | None:
    """Return the rule a user has registered for a module, or None."""
    if not _rules:
        return None
    return next((_rules[kind] for kind in type(module).__mro__ if kind in _rules), None)


def uses_of(
    module: nn.Module, rule: ModuleRule, inputs: Tensor, num_examples: int
) -> Iterator[tuple[nn.Parameter, Callable[[Any], Factor]]]:
    """Yield each parameter of a call, with the function that makes its gradients."""

    @remembered
    def gradients(deltas: Any) -> Mapping[str, Tensor]:
        return rule(module, inputs, deltas[0])

    for name, parameter in module.named_parameters():
        yield parameter, _maker(name, parameter, gradients, num_examples)


def _maker(
    name: str,
    parameter: nn.Parameter,
    gradients: Callable[[Any], Mapping[str, Tensor]],
    num_examples: int,
) -> Callable[[Any], Factor]:
    def factor(deltas: Any) -> Factor:
        values = gradients(deltas)
        expected = (num_examples, *parameter.shape)
        if not isinstance(values, Mapping):
            raise UnsupportedError(f"its rule gives {type(values).__name__}, not a mapping")
        if name not in values:
            raise UnsupportedError(f"its rule gives {sorted(values)}, not '{name}'")
        value = values[name]
        if not isinstance(value, Tensor) or tuple(value.shape) != expected:
            got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise UnsupportedError(f"its rule gives {got}; expected {list(expected)}")
        return Dense(value)

    return factor
