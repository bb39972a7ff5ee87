"""What a run-level analysis takes from a run: a measure, its steps, its layers, its labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sonde.exceptions import InvalidInputError, LayerNotFoundError
from sonde.log.selection import select_layers, select_steps

if TYPE_CHECKING:
    from sonde.log import MeasureLog, Run

__all__ = [
    "measure_log",
    "overflows_half",
    "run_labels",
    "select_layers",
    "select_other_layers",
    "select_steps",
]


def measure_log(
    run: Run, measure: str, source: str | None, advice: str = "pass one run, not several"
) -> MeasureLog:
    """Take one measure of a run; its default source if `source` is None.

    Raises:
        InvalidInputError: If `run` is a list of runs or a path, with `advice` for a list.
    """
    if isinstance(run, (list, tuple, dict)):
        raise InvalidInputError(
            f"a {type(run).__name__} was given where a run is expected; {advice}"
        )
    if isinstance(run, (str, Path)):
        raise InvalidInputError(f"'{run}' is a path, not a run; open it with sonde.open_run")
    return run[measure] if source is None else run[measure, source]


def run_labels(runs: Sequence[Run]) -> list[str]:
    """Name runs by their folder, by their whole path where folders share a name."""
    names = [run.name for run in runs]
    return [run.name if names.count(run.name) == 1 else str(run.path) for run in runs]


def select_other_layers(
    log: MeasureLog, layers: str | Sequence[str] | None, other_layers: str | Sequence[str] | None
) -> list[str]:
    """Expand the layers of a second side, which are those of the first if not named themselves.

    Raises:
        LayerNotFoundError: If a pattern fits no layer, with advice where it names the first side's.
    """
    if other_layers is not None or layers is None:
        return select_layers(log, other_layers)
    try:
        return select_layers(log, layers)
    except LayerNotFoundError as error:
        raise LayerNotFoundError(
            f"`layers` names the layers of both runs, but fits only the first; name those of run "
            f"'{log.run.name}' by `other_layers` (--other-layers in the shell): {error}"
        ) from error


def overflows_half(log: MeasureLog, step: int, layers: Sequence[str]) -> str | None:
    """Say that float16 could not hold the values of a record; None if that is not the reason."""
    for (layer, field), stream in log.describe(step).items():
        if layer in layers and stream.dtype == "float16":
            if np.isinf(log.array(field, step, layer, as_stored=True)).any():
                return "values beyond float16's largest, 65,504 (record with float32 or bfloat16)"
    return None
