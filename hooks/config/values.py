"""Values of a configuration file: plain YAML in, the objects of Python out.

A constructor such as `Sketch(dim, seed=0)` is written as its name with its arguments, by their
Python names: `{sketch: {dim: 256}}`; or with its first argument alone, `{sketch: 256}`; or, where
it needs none, as its name, `gram`. What it takes is read from its signature.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from sonde.hooks.losses.scores import Output
from sonde.hooks.model.layers import Selector
from sonde.hooks.schedule import Schedule, at, epochs, every, log_spaced
from sonde.hooks.stores.stores import Full, Gram, Sketch

from .imports import entry, imported
from .places import Place

# Any, in this file: what YAML holds, and what its values are turned into.

SCHEDULES: Mapping[str, Callable[..., Schedule]] = {
    function.__name__: function for function in (every, at, log_spaced, epochs)
}
STORES: Mapping[str, Callable[..., Any]] = {
    kind.__name__.lower(): kind for kind in (Gram, Sketch, Full)
}


Converter = Callable[[Any, Place], Any]


def name_and_arguments(given: Any, place: Place, what: str) -> tuple[str, Any]:
    """Return the name of a constructor, and what it is given: None, a value or a mapping.

    Raises:
        InvalidInputError: If it is neither a name nor a mapping with one name.
    """
    if isinstance(given, str):
        return given, None
    if isinstance(given, Mapping) and len(given) == 1:
        name, arguments = next(iter(given.items()))
        return str(name), arguments
    raise place.unexpected(given, f"{what}: a name, or `name: arguments`")


def construct(
    function: Callable[..., Any],
    given: Any,
    place: Place,
    converters: Mapping[str, Converter] | None = None,
) -> Any:
    """Call a constructor with what a file says of its arguments.

    Args:
        function: The constructor.
        given: None; its first argument; or a mapping of arguments by name.
        place: Where that stands.
        converters: How arguments that are no plain values are made, by their name.

    Returns:
        What it returns.

    Raises:
        InvalidInputError: If an argument is unknown, missing or of another kind.
    """
    parameters = inspect.signature(function).parameters
    first = next(iter(parameters.values()), None)
    if first is not None and first.kind is first.VAR_POSITIONAL:
        values = given if isinstance(given, list) else [given]
        hint = hints_of(function).get(first.name)
        positional = [checked(v, hint, place.below(i)) for i, v in enumerate(values)]
        with place.told():
            return function(*positional)
    if given is None:
        arguments: Mapping[str, Any] = {}
    elif isinstance(given, Mapping):
        arguments = given
    elif first is None or first.kind is first.KEYWORD_ONLY:
        raise place.unexpected(given, f"arguments by name: {', '.join(parameters) or 'none'}")
    else:
        arguments = {first.name: given}
    return _call(function, arguments, parameters, place, converters or {})


def hints_of(function: Callable[..., Any]) -> Mapping[str, Any]:
    """Return the types of the arguments of a function, or a class, as far as they are known."""
    is_class = isinstance(function, type)
    try:
        return typing.get_type_hints(vars(function)["__init__"] if is_class else function)
    except (KeyError, NameError):  # Of the user's: inherited, or of names not to be resolved.
        return {}


def checked(value: Any, hint: Any, place: Place) -> Any:
    """Return a plain value, if it is of the type that is expected.

    Raises:
        InvalidInputError: If it is not.
    """
    if hint is not None and not _fits(value, hint):
        raise place.unexpected(value, _text(hint))
    return value


def to_schedule(given: Any, place: Place) -> Schedule:
    """Make a schedule: `{every: 100}`, `log_spaced`, or a list whose entries are combined.

    Raises:
        InvalidInputError: If it is none.
    """
    if isinstance(given, list) and given:
        combined, *others = [to_schedule(item, place.below(i)) for i, item in enumerate(given)]
        for other in others:
            combined = combined | other
        return combined
    name, arguments = name_and_arguments(given, place, "a schedule")
    if name not in SCHEDULES:
        raise place.unknown(name, list(SCHEDULES), "schedule")
    made: Schedule = construct(SCHEDULES[name], arguments, place.below(name))
    return made


def to_store(given: Any, place: Place) -> Any:
    """Make a store: `gram`, `{sketch: 256}`, `{full: {dtype: float16}}`.

    Raises:
        InvalidInputError: If it is none.
    """
    name, arguments = name_and_arguments(given, place, "a store")
    if name not in STORES:
        raise place.unknown(name, list(STORES), "store")
    return construct(STORES[name], arguments, place.below(name), {"dtype": to_dtype})


def to_dtype(given: Any, place: Place) -> torch.dtype:
    """Find a dtype by its name: `float16`, or `torch.float16`.

    Raises:
        InvalidInputError: If there is none.
    """
    found = getattr(torch, str(given).removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise place.unexpected(given, "a dtype, such as float16")
    return found


def to_layers(given: Any, place: Place) -> Selector | list[Selector]:
    """Make selectors of layers: globs, and module types by their dotted name.

    Raises:
        InvalidInputError: If one is neither.
    """
    if isinstance(given, list):
        return [_selector(item, place.below(i)) for i, item in enumerate(given)]
    return _selector(given, place)


def to_output(given: Any, place: Place) -> Output:
    """Return which output of a model is meant; an `entry` is a function that chooses it.

    Raises:
        InvalidInputError: If it is neither text nor a whole number.
    """
    if isinstance(given, Mapping) and list(given) == ["entry"]:
        found: Output = entry(given["entry"], place.below("entry"))
        return found
    if isinstance(given, bool) or not isinstance(given, str | int):
        raise place.unexpected(given, "the name, position or path of an output, such as logits")
    if isinstance(given, str) and ":" in given:
        raise place.unexpected(
            given, f"the name or path of an output; a function is written as {{entry: {given}}}"
        )
    return given


def _selector(given: Any, place: Place) -> Selector:
    if isinstance(given, Mapping) and list(given) == ["entry"]:
        chosen: Selector = entry(given["entry"], place.below("entry"))
        return chosen
    if not isinstance(given, str):
        raise place.unexpected(given, "a glob over layer names, or a module type by dotted name")
    root, last = given.partition(".")[0], given.rpartition(".")[2]
    # Names of layers seldom end in a capitalised part; one that does can be written as a glob.
    is_type = "." in given and last[:1].isupper() and given.replace(".", "").isidentifier()
    if not is_type or (root not in sys.modules and importlib.util.find_spec(root) is None):
        return given
    found = imported(given, place)
    if not isinstance(found, type) or not issubclass(found, nn.Module):
        raise place.unexpected(given, "a module type")
    return found


def _call(
    function: Callable[..., Any],
    given: Mapping[str, Any],
    parameters: Mapping[str, inspect.Parameter],
    place: Place,
    converters: Mapping[str, Converter],
) -> Any:
    hints = hints_of(function)
    arguments = {}
    for name, value in given.items():
        if name not in parameters:
            raise place.unknown(name, list(parameters), "argument")
        here = place.below(name)
        is_plain = name not in converters or value is None
        arguments[name] = (
            checked(value, hints.get(name), here) if is_plain else converters[name](value, here)
        )
    needed = [name for name, item in parameters.items() if item.default is item.empty]
    lacking = [name for name in needed if name not in arguments]
    if lacking:
        raise place.error(f"`{lacking[0]}` is missing")
    with place.told():
        return function(**arguments)


def _fits(value: Any, hint: Any) -> bool:
    """Tell whether a plain value is of a type; of types that are not plain, any value is."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return value in inner
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in inner if not _is_rich(option)) or all(
            map(_is_rich, inner)
        )
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (bool, str, types.NoneType):
        return isinstance(value, hint)
    if origin is not None and issubclass(origin, Mapping):
        return isinstance(value, Mapping)
    if origin is not None and issubclass(origin, Sequence):
        return isinstance(value, list)
    return True


def _is_rich(hint: Any) -> bool:
    """Tell whether a type has no plain values, such as an array."""
    return hint is Any or (
        typing.get_origin(hint) not in (None, typing.Literal)
        and not issubclass(typing.get_origin(hint), Mapping | Sequence)
    )


def _text(hint: Any) -> str:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return " or ".join(map(repr, inner))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_text(option) for option in inner if not _is_rich(option))
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    if hint is types.NoneType:
        return "null"
    if origin is not None:
        return "a mapping" if issubclass(origin, Mapping) else "a list"
    return words.get(hint, getattr(hint, "__name__", str(hint)))
