"""What an optimizer trains beside the model that is recorded."""

from __future__ import annotations

import gc

import torch
from torch import nn

_NAMED = 4


def trained_outside(model: nn.Module, optimizer: torch.optim.Optimizer) -> str | None:
    """Say which parts an optimizer trains that are no part of a model; None if there are none.

    Where a script calls methods of a module and not the module itself, the first of its parts that
    is called is taken for the model.

    Args:
        model: The model that is recorded.
        optimizer: Its optimizer.
    """
    own = {id(parameter) for parameter in model.parameters()}
    others = [p for group in optimizer.param_groups for p in group["params"] if id(p) not in own]
    if not others:
        return None
    name = type(model).__name__
    number = sum(parameter.numel() for parameter in others)
    line = f"{number:,} parameters that the optimizer trains outside {name} are not recorded"
    outer = _outer(model, {id(parameter) for parameter in others})
    if outer is None:
        return line
    whole, parts = outer
    kind = type(whole).__name__
    named = ", ".join(parts[:_NAMED]) + (", …" if len(parts) > _NAMED else "")
    return f"{line}: {named} of {kind}, as the script calls methods of {kind}, not {kind} itself"


def _outer(model: nn.Module, others: set[int]) -> tuple[nn.Module, list[str]] | None:
    """Return the smallest module around a model that holds other parameters, and its parts."""
    found = []
    for candidate in gc.get_objects():
        # Not by isinstance, which asks objects that stand in for others.
        if issubclass(type(candidate), nn.Module) and candidate is not model:
            if any(module is model for module in candidate.modules()):
                names = [n for n, p in candidate.named_parameters() if id(p) in others]
                if names:
                    found.append((candidate, list(dict.fromkeys(n.split(".")[0] for n in names))))
    return min(found, key=lambda item: len(list(item[0].modules())), default=None)
