"""The log: crash-safe journals, sealed HDF5 segments, and the reader of both.

Nothing here imports torch; the writing side does not import h5py either.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .family import Family, open_runs
    from .format.damage import Damage
    from .format.payload import LogArray
    from .layer_log import LayerLog
    from .measure_log import MeasureLog
    from .run import Run, open_run
    from .writing.writer import LogWriter

__all__ = [
    "Damage",
    "Family",
    "LayerLog",
    "LogArray",
    "LogWriter",
    "MeasureLog",
    "Run",
    "open_run",
    "open_runs",
]

_HOMES = {
    "Damage": "format.damage",
    "Family": "family",
    "LayerLog": "layer_log",
    "LogArray": "format.payload",
    "LogWriter": "writing.writer",
    "MeasureLog": "measure_log",
    "Run": "run",
    "open_run": "run",
    "open_runs": "family",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
