"""Layers and their names: what a model consists of, and which of it a selector takes."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeAlias

import torch
from torch import nn

from sonde.exceptions import InvalidInputError, LayerNotFoundError, UnsupportedModelError

Selector: TypeAlias = str | type[nn.Module] | Callable[[str, nn.Module], bool]
"""A glob over layer names, a module type, or a predicate of name and module; `-GLOB` excludes."""

_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def unwrap(model: nn.Module) -> nn.Module:
    """Return the user's own module behind DistributedDataParallel, torch.compile and the like.

    Raises:
        InvalidInputError: If it is no module.
        UnsupportedModelError: If the model runs without calling its modules.
    """
    if not isinstance(model, nn.Module):
        raise InvalidInputError(
            f"`model` is a {type(model).__name__}; expected a torch.nn.Module, such as the model "
            "that is trained"
        )
    inner = _inner(model)
    while inner is not None:
        model, inner = inner, _inner(inner)
    return model


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return every module by its canonical path, in the order of `named_modules`.

    Wrappers leave no trace in the names; a module that is shared is listed under its first name.

    Raises:
        UnsupportedModelError: If the model runs without calling its modules.
    """
    found: dict[nn.Module, str] = {}
    waiting = [("", model)]
    while waiting:
        name, module = waiting.pop()
        module = unwrap(module)
        if module in found:
            continue
        found[module] = name
        start = f"{name}." if name else ""
        children = [(start + own, child) for own, child in module._modules.items()]
        waiting += [(name, child) for name, child in reversed(children) if child is not None]
    return {name: module for module, name in found.items()}


def select_layers(
    model: nn.Module, selectors: Selector | Sequence[Selector] | None = None
) -> dict[str, nn.Module]:
    """Return the layers that any selector takes, by name.

    Args:
        model: The model.
        selectors: Globs over canonical names (`layer*.conv?`), module types, or predicates of
            (name, module). A glob behind `-` takes layers out again, whatever took them; where
            nothing else is given, out of what None takes, too: every module without children, and
            nn.MultiheadAttention in place of its child, which it never calls.

    Raises:
        LayerNotFoundError: If a selector takes nothing, or all is taken out again.
        UnsupportedModelError: If the model runs without calling its modules.
    """
    layers = layers_of(model)
    if selectors is None:
        selectors = []
    elif isinstance(selectors, str | type) or callable(selectors):
        selectors = [selectors]
    excluding = [s for s in selectors if isinstance(s, str) and s.startswith("-")]
    taken: set[str] = set()
    for selector in [s for s in selectors if s not in excluding]:
        taken |= _matches(selector, layers)
    if len(selectors) == len(excluding):
        taken = _leaves(layers)
    for exclusion in excluding:
        taken -= _matches(exclusion[1:], layers)
    if not taken:
        raise LayerNotFoundError(f"{', '.join(excluding)} takes out every layer that was selected")
    return {name: module for name, module in layers.items() if name in taken}


def _inner(model: nn.Module) -> nn.Module | None:
    if isinstance(model, torch.jit.ScriptModule):
        raise UnsupportedModelError(
            f"{type(model).__name__} is a ScriptModule, whose modules run no hooks; "
            "record the model before torch.jit.script or torch.jit.trace"
        )
    if isinstance(model, nn.DataParallel):
        raise UnsupportedModelError(
            "nn.DataParallel copies the model in every forward pass, so hooks see the copies; "
            "use DistributedDataParallel, or record `model.module` while training on one device"
        )
    for name in _WRAPPED:
        inner: nn.Module | None = model._modules.get(name)
        if inner is not None:
            return inner
    if isinstance(model, nn.parallel.DistributedDataParallel):
        inner = model.module
        return inner
    return None


def _leaves(layers: Mapping[str, nn.Module]) -> set[str]:
    whole = [module for module in layers.values() if isinstance(module, nn.MultiheadAttention)]
    inside = {child for module in whole for child in module.modules()}.difference(whole)
    return {
        name
        for name, module in layers.items()
        if module in whole or (module not in inside and next(module.children(), None) is None)
    }


def _matches(selector: Selector, layers: Mapping[str, nn.Module]) -> set[str]:
    """Return the layers a selector takes.

    Raises:
        LayerNotFoundError: If it takes nothing.
    """
    matches = {name for name, module in layers.items() if _takes(selector, name, module)}
    if not matches:
        raise LayerNotFoundError(_explain_empty(selector, layers))
    return matches


def _takes(selector: Selector, name: str, module: nn.Module) -> bool:
    if isinstance(selector, str):
        return fnmatchcase(name, selector)
    if isinstance(selector, type):
        return isinstance(module, selector)
    if callable(selector):
        return bool(selector(name, module))
    raise InvalidInputError(
        f"a layer selector must be a glob, a module type or a predicate, not {selector!r}"
    )


def _explain_empty(selector: Selector, layers: Mapping[str, nn.Module]) -> str:
    names = [name for name in layers if name]
    if isinstance(selector, str):
        near = difflib.get_close_matches(selector, names, n=6, cutoff=0.5)
        what = f"no layer matches '{selector}'"
        hint = f"near: {', '.join(near)}" if near else f"layers: {', '.join(names[:20])}"
    else:
        what = f"no layer is taken by {getattr(selector, '__name__', selector)}"
        kinds = dict.fromkeys(type(module).__name__ for module in layers.values())
        hint = f"the model has: {', '.join(kinds)}"
    return f"{what}; {hint}"
