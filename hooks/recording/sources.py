"""The names of sources: every probe of a recorder has one, and no two share it."""

from __future__ import annotations

from collections.abc import Sequence

from sonde.exceptions import InvalidInputError
from sonde.hooks.examples.probe import Probe
from sonde.hooks.measures.base import Measure


def name_probes(measures: Sequence[Measure]) -> None:
    """Name the probes that have no name: `probe`, `probe1`, … in order of use."""
    probes: list[Probe] = []
    for measure in measures:
        if measure.probe is not None and not any(measure.probe is known for known in probes):
            probes.append(measure.probe)
    taken = {probe.name for probe in probes}
    for probe in probes:
        if probe.name is None:
            free = (f"probe{number or ''}" for number in range(len(probes) + 1))
            probe.name = next(name for name in free if name not in taken)
            taken.add(probe.name)


def check_names(measures: Sequence[Measure]) -> None:
    """Refuse measures whose records could not be told apart.

    Raises:
        InvalidInputError: If a measure is given twice for one source, or two sources share a name.
    """
    trainings = {measure.training for measure in measures if measure.training is not None}
    if len(trainings) > 1:
        raise InvalidInputError(
            f"the training is given in several ways: {', '.join(map(str, trainings))}; "
            "give the same to all measures"
        )
    sources: dict[str, Probe | None] = {}
    seen: set[tuple[str, str]] = set()
    for measure in measures:
        if (measure.name, measure.source) in seen:
            raise InvalidInputError(
                f"{type(measure).__name__} is given twice for '{measure.source}'; give the second "
                "probe a name of its own: Probe(…, name='validation')"
            )
        seen.add((measure.name, measure.source))
        if sources.setdefault(measure.source, measure.probe) is not measure.probe:
            raise InvalidInputError(
                f"two different sources are called '{measure.source}'; names must differ"
            )
