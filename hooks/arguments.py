"""Arguments: refuse a value of another type with what was given and what is expected."""

from __future__ import annotations

import numbers
from typing import Any

import torch

from sonde.exceptions import InvalidInputError

from .schedule import Schedule


def check_whole(name: str, value: Any, least: int, *, note: str = "") -> None:
    """Refuse what is no whole number, or a smaller one.

    Args:
        name: The argument's name.
        value: What was given for it.
        least: The smallest that is accepted.
        note: What else the message says of the limit.

    Raises:
        InvalidInputError: If it is refused.
    """
    is_whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not is_whole or value < least:
        raise InvalidInputError(f"`{name}` (={value!r}) must be a whole number >= {least}{note}")


def check_dtype(dtype: Any) -> None:
    """Refuse what is neither None nor a type of torch.

    Raises:
        InvalidInputError: If it is refused.
    """
    if dtype is None or isinstance(dtype, torch.dtype):
        return
    named = dtype if isinstance(dtype, str) else getattr(dtype, "__name__", None)
    known = isinstance(named, str) and isinstance(getattr(torch, named, None), torch.dtype)
    example = f"torch.{named}" if known else "torch.float32"
    raise InvalidInputError(f"`dtype` (={dtype!r}) must be a torch.dtype, such as {example}")


def check_schedule(when: Any) -> None:
    """Refuse what is neither None nor a schedule.

    Raises:
        InvalidInputError: If it is refused.
    """
    if when is not None and not isinstance(when, Schedule):
        raise InvalidInputError(
            f"`when` (={when!r}) must be a schedule, such as sonde.every(100) or sonde.at(0, 10)"
        )
