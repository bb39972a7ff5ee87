"""The configuration of runs as flat keys and plain values, so that runs can be told apart by them.

A configuration is what `Recorder(config=…)` was given, read back from `run.json`. Keys of nested
mappings are joined by dots: `optimizer.lr`. Lists become tuples, so that every value can be a key.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

Value = Any
"""A value of a configuration: None, a truth value, a number, a text, or a tuple of values."""

Wanted = Value | Collection[Value] | Callable[[Value], bool]
"""What a value is asked to be: equal, one of several (a list or a set), or what a function says."""


def flat_config(config: object) -> dict[str, Value]:
    """Flatten a configuration.

    Args:
        config: What `run.json` says; anything but a mapping holds no key.

    Returns:
        Its values by dotted key, in the order they were written. An empty mapping has no key.

    Example:
        >>> flat_config({"width": 64, "optimizer": {"lr": 0.1, "betas": [0.9, 0.99]}})
        {'width': 64, 'optimizer.lr': 0.1, 'optimizer.betas': (0.9, 0.99)}
    """
    if not isinstance(config, Mapping):
        return {}
    flat: dict[str, Value] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat.update({f"{key}.{inner}": found for inner, found in flat_config(value).items()})
        else:
            flat[str(key)] = _plain(value)
    return flat


def _plain(value: object) -> Value:
    """Make a value hashable, and NaN the same object everywhere, so that it is one key."""
    if isinstance(value, float) and math.isnan(value):
        return math.nan
    if isinstance(value, (list, tuple)):
        return tuple(_plain(item) for item in value)
    return json.dumps(value) if isinstance(value, Mapping) else value


def fits(value: Value, wanted: Wanted) -> bool:
    """Tell whether a value is what was asked for.

    Args:
        value: A value of `flat_config`.
        wanted: A value to equal, a list or set of which one has to be equal, or a function.

    Example:
        >>> fits(64, 64.0), fits(64, [32, 64]), fits(64, lambda width: width > 64)
        (True, True, False)
    """
    if callable(wanted):
        return bool(wanted(value))
    if isinstance(wanted, (list, set, frozenset)) and _plain(wanted) != value:
        return any(fits(value, one) for one in wanted)
    plain = _plain(wanted)
    return value is plain or bool(value == plain)


def order_of(value: Value) -> tuple[int, Any, str]:
    """Return what values of any kinds are sorted by: None, numbers, texts, tuples."""
    if value is None:
        return (0, 0, "")
    if isinstance(value, (int, float)):
        return (3, 0, "") if math.isnan(value) else (2, value, "")
    if isinstance(value, tuple):
        return (5, 0, repr(value))
    return (4, 0, str(value))


def parse_value(text: str) -> Value:
    """Read a value that was typed: JSON where it is, such as 64, 1e-3, true or null, else a text.

    Example:
        >>> parse_value("64"), parse_value("1e-3"), parse_value("true"), parse_value("resnet18")
        (64, 0.001, True, 'resnet18')
    """
    try:
        return _plain(json.loads(text))
    except ValueError:
        return text
