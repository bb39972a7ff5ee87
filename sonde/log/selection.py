"""Which of the recorded steps and layers are meant; what matches nothing is an error."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from sonde.exceptions import InvalidInputError, LayerNotFoundError, StepNotFoundError

from .measure_log import listing

if TYPE_CHECKING:
    from .measure_log import MeasureLog


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
    _refuse_nothing(steps)
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
    wanted = ["*"] if patterns is None else patterns
    return match_layers(wanted, log.layers, f"'{log.measure}' in run '{log.run.name}'")


def match_layers(patterns: str | Sequence[str], layers: Sequence[str], of: str) -> list[str]:
    """Expand names and globs to those of the given layers.

    Args:
        patterns: A name or glob, or several.
        layers: All layers, in model order.
        of: What has these layers, for messages.

    Returns:
        Each layer once: pattern by pattern, and in model order within a pattern.

    Raises:
        LayerNotFoundError: If a pattern matches no layer, with near names and all names.
    """
    selected: dict[str, None] = {}
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        # An exact name first: "0.weight[1]" is a name even where it is a glob, too.
        exact = [pattern] if pattern in layers else []
        matches = exact or [name for name in layers if fnmatchcase(name, pattern)]
        if not matches:
            near = difflib.get_close_matches(pattern, layers)
            hint = f"; did you mean {_quoted(near)}?" if near else ""
            raise LayerNotFoundError(
                f"no layer of {of} matches '{pattern}'{hint}; layers: {listing(layers)}"
            )
        selected.update(dict.fromkeys(matches))
    if not selected:
        raise LayerNotFoundError(f"no layers selected; layers: {_quoted(layers)}")
    return list(selected)


def match_steps(
    steps: Sequence[int] | slice, recorded: Sequence[Collection[int]], of: str
) -> list[set[int]]:
    """Choose steps of several measures, each of which was recorded at steps of its own.

    Args:
        steps: Steps, negative ones counted from the end of each measure's; or a slice by value,
            which takes of all numbers from `start` to before `stop`, every `step`-th, those that
            were recorded.
        recorded: The steps of each measure.
        of: What has these measures, for messages.

    Returns:
        The chosen steps of each measure.

    Raises:
        InvalidInputError: If `steps` is empty, or a slice that does not count forward from 0.
        StepNotFoundError: If no measure has a step, or none lies in the slice.
    """
    known = sorted(set().union(*recorded))
    if isinstance(steps, slice):
        chosen = [_within(steps, measure) for measure in recorded]
        if not any(chosen):
            raise StepNotFoundError(
                f"no step of {of} lies in {_text(steps)}; recorded steps: {listing(known)}"
            )
        return chosen
    _refuse_nothing(steps)
    chosen = [set() for _ in recorded]
    for step in steps:
        is_found = False
        for at, measure in zip(chosen, map(sorted, recorded), strict=True):
            if step < 0:
                found = measure[step:][:1] if -step <= len(measure) else []
            else:
                found = [step] if step in measure else []
            at.update(found)
            is_found = is_found or bool(found)
        if not is_found:
            near = sorted(sorted(known, key=lambda other: abs(other - step))[:2])
            hint = f"; near it: {listing(near)}" if near and step >= 0 else ""
            raise StepNotFoundError(
                f"no measure of {of} has step {step}{hint}; recorded steps: {listing(known)}"
            )
    return chosen


def _within(steps: slice, recorded: Collection[int]) -> set[int]:
    start, stop, stride = steps.start or 0, steps.stop, steps.step
    if start < 0 or (stop is not None and stop < 0) or (stride is not None and stride < 1):
        raise InvalidInputError(
            f"`steps` (={_text(steps)}) takes steps by their number, forward from 0; expected "
            "start and stop >= 0 and a stride >= 1"
        )
    return {
        step
        for step in recorded
        if step >= start
        and (stop is None or step < stop)
        and (step - start) % (1 if stride is None else stride) == 0
    }


def _text(steps: slice) -> str:
    parts = [steps.start, steps.stop, *([] if steps.step is None else [steps.step])]
    return ":".join("" if part is None else str(part) for part in parts)


def _refuse_nothing(steps: Sequence[int]) -> None:
    if len(steps) == 0:
        raise InvalidInputError("`steps` is empty; expected steps, or None for all recorded steps")


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)
