"""Losses of a configuration file: those of PyTorch by name, and what an `entry` is."""

from __future__ import annotations

import difflib
import inspect
import types
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from torch import nn

from sonde.visible import visible

from .imports import entry
from .places import Place
from .values import construct, name_and_arguments

# Any, in this file: what YAML holds, and what its values are turned into.


def to_loss(given: Any, place: Place) -> Any:
    """Return a loss: one of PyTorch's by its dotted name, or what an `entry` is.

    PyTorch's are functions of `torch.nn.functional`, and modules of `torch.nn`, which are made with
    `{name: arguments}` if given. Whatever else is named is not imported: it could be any program.

    Raises:
        InvalidInputError: If it is none.
    """
    if isinstance(given, Mapping) and "entry" in given:
        return _loss_of_entry(given, place)
    name, arguments = name_and_arguments(given, place, "the dotted name of a loss")
    module, _, last = name.rpartition(".")
    if module == "torch.nn.functional" and last in (known := _functional_losses()):
        if arguments is not None:
            raise place.unexpected(arguments, f"no arguments, as {name} is a function")
        return known[last]
    if module in ("torch.nn", "torch.nn.modules.loss") and last in (kinds := _loss_modules()):
        try:
            return construct(kinds[last], arguments, place)
        except (TypeError, ValueError, RuntimeError) as error:  # Of PyTorch, of its arguments.
            raise place.error(f"{name} cannot be made: {error}") from error
    known_names = [
        *(f"torch.nn.functional.{name}" for name in _functional_losses()),
        *(f"torch.nn.{name}" for name in _loss_modules()),
    ]
    near = difflib.get_close_matches(name, known_names, n=3, cutoff=0.5)
    hint = f"near: {', '.join(near)}; " if near else ""
    raise place.error(
        f"got {visible(name)!r}, which is no loss of torch.nn.functional or torch.nn; {hint}one of "
        "your own is written as `{entry: file.py:function}`, which runs that file"
    )


def _loss_of_entry(given: Mapping[str, Any], place: Place) -> Any:
    for key in given:
        if key not in ("entry", "arguments"):
            raise place.unknown(key, ["entry", "arguments"], "argument of a loss")
    found = entry(given["entry"], place.below("entry"))
    if isinstance(found, type) or given.get("arguments") is not None:
        found = construct(found, given.get("arguments"), place.below("arguments"))
    if not callable(found):
        raise place.unexpected(given["entry"], "a function of (outputs, targets)")
    return found


@lru_cache(maxsize=1)
def _functional_losses() -> Mapping[str, Callable[..., Any]]:
    """Return the functions of PyTorch that take outputs and targets, and need nothing else."""
    losses = {}
    for name, function in vars(nn.functional).items():
        if name.startswith("_") or not isinstance(function, types.FunctionType):
            continue
        parameters = list(inspect.signature(function).parameters.values())
        needed = [item.name for item in parameters if item.default is item.empty]
        if needed == ["input", "target"]:
            losses[name] = function
    return losses


@lru_cache(maxsize=1)
def _loss_modules() -> Mapping[str, type[nn.Module]]:
    base = nn.modules.loss._Loss
    return {
        name: kind
        for name, kind in vars(nn).items()
        if isinstance(kind, type) and issubclass(kind, base)
    }
