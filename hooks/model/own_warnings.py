"""Warnings of the model that sonde's own passes cause: left out, and never counted as seen.

The model gives the same warnings in the training's passes. `warnings.catch_warnings` would hide
them, too, but it makes Python forget which warnings it has shown: those of the script would appear
once more after each of our passes. A filter that is put in place without that leaves no trace.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_NOT_OURS = re.compile("(?!sonde: )")
# PyTorch gives some of its own once in a process: the training's pass would not bring them again.
_OF_PYTHON = re.compile(r"(?!sonde: )(?!.*\(Triggered internally at)", re.DOTALL)


@contextmanager
def without_warnings(*, of_torch: bool = False) -> Iterator[None]:
    """Let no warning of what runs within be shown or raised, but those of sonde itself.

    Args:
        of_torch: Hide those from within PyTorch, too, which it may give only once in a process.
    """
    ours = ("ignore", _NOT_OURS if of_torch else _OF_PYTHON, Warning, None, 0)
    filters = warnings.filters
    filters.insert(0, ours)  # type: ignore[attr-defined] # a list, which is typed as a sequence
    try:
        yield
    finally:
        # Whoever has replaced the list meanwhile has left ours behind.
        if any(item is ours for item in filters):
            at = next(at for at, item in enumerate(filters) if item is ours)
            del filters[at]  # type: ignore[attr-defined]
