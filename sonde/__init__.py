"""sonde: the flight recorder of a neural-network training.

Record with `sonde.attach` or `sonde.Recorder`, read with `sonde.open_run`, answer with
`sonde.analysis`. Names are imported when they are first used, so that reading and analyzing never
load torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sonde import analysis, hooks, integrations
    from sonde.exceptions import SondeError, SondeWarning
    from sonde.hooks import (
        TRAINING,
        Activations,
        Config,
        DecisionPlanes,
        ExampleGradients,
        Full,
        Gram,
        OutputGradients,
        Predictions,
        Probe,
        Recorder,
        Scalars,
        Sketch,
        Training,
        at,
        attach,
        epochs,
        every,
        example_gradients,
        gradient_rule,
        layers,
        load_config,
        log_spaced,
    )
    from sonde.log import Family, Run, open_run, open_runs

__version__ = "0.1.0"

__all__ = [
    "TRAINING",
    "Activations",
    "Config",
    "DecisionPlanes",
    "ExampleGradients",
    "Family",
    "Full",
    "Gram",
    "OutputGradients",
    "Predictions",
    "Probe",
    "Recorder",
    "Run",
    "Scalars",
    "Sketch",
    "SondeError",
    "SondeWarning",
    "Training",
    "analysis",
    "at",
    "attach",
    "epochs",
    "every",
    "example_gradients",
    "gradient_rule",
    "hooks",
    "integrations",
    "layers",
    "load_config",
    "log_spaced",
    "open_run",
    "open_runs",
]

_FOLDERS = {"analysis", "hooks", "integrations"}
_HOMES = {
    "Family": "sonde.log",
    "Run": "sonde.log",
    "open_run": "sonde.log",
    "open_runs": "sonde.log",
    "SondeError": "sonde.exceptions",
    "SondeWarning": "sonde.exceptions",
}


def __getattr__(name: str) -> object:
    if name in _FOLDERS:
        return import_module(f"sonde.{name}")
    if name not in __all__:
        raise AttributeError(f"module 'sonde' has no attribute {name!r}")
    return getattr(import_module(_HOMES.get(name, "sonde.hooks")), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
