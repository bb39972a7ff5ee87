"""What a run-level analysis takes from a run: a measure, its steps, its layers, its labels."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from sonde.exceptions import InvalidInputError, LayerNotFoundError, StepNotFoundError
from sonde.log.measure_log import listing

if TYPE_CHECKING:
    from sonde.log import MeasureLog, Run


def measure_log(run: Run, measure: str, source: str | None) -> MeasureLog:
    """Take one measure of a run; its default source if `source` is None."""
    return run[measure] if source is None else run[measure, source]


def select_steps(log: MeasureLog, steps: Sequence[int] | None) -> list[int]:
    """Resolve steps to those recorded, in the order given; all of them if None.

    Args:
        log: The measure.
        steps: Steps, negative ones counted from the end of the recorded steps.

    Returns:
        Recorded steps.

    Raises:
        InvalidInputError: If `steps` is an empty list.
        StepNotFoundError: If nothing was recorded, or a step was not.
    """
    if not log.steps:
        raise StepNotFoundError(f"run '{log.run.name}' has no record of '{log.measure}' yet")
    if steps is None:
        return list(log.steps)
    if len(steps) == 0:
        raise InvalidInputError("`steps` is empty; expected steps, or None for all recorded steps")
    return [log.resolve_step(step) for step in steps]


def select_layers(log: MeasureLog, patterns: str | Sequence[str] | None) -> list[str]:
    """Expand names and globs to layer names; all layers, in model order, if None.

    Args:
        log: The measure whose layers are meant.
        patterns: A name or glob, or several.

    Returns:
        Each layer once: pattern by pattern, and in model order within a pattern.

    Raises:
        LayerNotFoundError: If a pattern matches no layer, with near names and all names.
    """
    if patterns is None:
        patterns = ["*"]
    selected: dict[str, None] = {}
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        # An exact name first: "0.weight[1]" is a name even where it is a glob, too.
        exact = [pattern] if pattern in log.layers else []
        matches = exact or [name for name in log.layers if fnmatchcase(name, pattern)]
        if not matches:
            raise LayerNotFoundError(_no_match(log, pattern))
        selected.update(dict.fromkeys(matches))
    if not selected:
        raise LayerNotFoundError(f"no layers selected; layers: {_quoted(log.layers)}")
    return list(selected)


def run_labels(runs: Sequence[Run]) -> list[str]:
    """Name runs by their folder, by their whole path where folders share a name."""
    names = [run.name for run in runs]
    return [run.name if names.count(run.name) == 1 else str(run.path) for run in runs]


def _no_match(log: MeasureLog, pattern: str) -> str:
    near = difflib.get_close_matches(pattern, log.layers)
    hint = f"; did you mean {_quoted(near)}?" if near else ""
    return (
        f"no layer of '{log.measure}' in run '{log.run.name}' matches '{pattern}'{hint}"
        f"; layers: {listing(log.layers)}"
    )


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)
