"""Offline analysis of recorded runs: no model, no torch, no GPU.

Each analysis is a function of runs that returns an xarray object with named dimensions, on top of
pure functions of arrays (`kernels`, `null` and the modules of the analyses). `plots` draws the
results; it is imported on first use, so that an analysis does not import matplotlib.
"""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

from sonde.log.predictions import predicted_classes

from .arrays import kernels, null
from .blocks import blocks
from .boundary import fragmentation, reproducibility
from .cka import cka
from .components import components
from .influence import influence
from .mutual_knn import mutual_knn
from .over_steps import cka_over_steps
from .stiffness import stiffness
from .sweep import sweep

if TYPE_CHECKING:
    from . import plots

__all__ = [
    "blocks",
    "cka",
    "cka_over_steps",
    "components",
    "fragmentation",
    "influence",
    "kernels",
    "mutual_knn",
    "null",
    "plots",
    "predicted_classes",
    "reproducibility",
    "stiffness",
    "sweep",
]


def __getattr__(name: str) -> ModuleType:
    if name == "plots":
        return importlib.import_module(".plots", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
