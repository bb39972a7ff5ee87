"""What a run-level analysis takes from a run: a measure, its steps, its layers, its labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sonde.log.selection import select_layers, select_steps

if TYPE_CHECKING:
    from sonde.log import MeasureLog, Run

__all__ = ["measure_log", "run_labels", "select_layers", "select_steps"]


def measure_log(run: Run, measure: str, source: str | None) -> MeasureLog:
    """Take one measure of a run; its default source if `source` is None."""
    return run[measure] if source is None else run[measure, source]


def run_labels(runs: Sequence[Run]) -> list[str]:
    """Name runs by their folder, by their whole path where folders share a name."""
    names = [run.name for run in runs]
    return [run.name if names.count(run.name) == 1 else str(run.path) for run in runs]
