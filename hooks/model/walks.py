"""Walks over a model: its modules and its parameters.

`nn.Module.modules` passes each module through a generator for every module around it. A due step
walks over the model a dozen times, so of small models that takes longer than some of their layers.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn


def modules_of(model: nn.Module) -> list[nn.Module]:
    """Return a model and all modules within, each once, in the order of `nn.Module.modules`."""
    found: dict[nn.Module, None] = {}
    waiting: list[nn.Module | None] = [model]
    while waiting:
        module = waiting.pop()
        if module is not None and module not in found:
            found[module] = None
            if module._modules:
                waiting.extend(reversed(module._modules.values()))
    return list(found)


def parameters_of(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the parameters of a model; those that are tied at each of their places."""
    for module in modules_of(model):
        for parameter in module._parameters.values():
            if parameter is not None:
                yield parameter
