"""Configuration files: all that a `Config` can say, in YAML."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from sonde.hooks import measures as measure_types
from sonde.hooks.examples.probe import Probe
from sonde.hooks.measures import Measure, OutputGradients
from sonde.hooks.recording.recorder import Recorder
from sonde.hooks.training.source import TRAINING, Training

from .config import Config, as_config, recorder_options
from .losses import to_loss
from .places import Place
from .sources import Sources
from .values import (
    Converter,
    checked,
    construct,
    hints_of,
    name_and_arguments,
    to_layers,
    to_output,
    to_schedule,
    to_store,
)

# Any, in this file: what YAML holds.

MEASURES: Mapping[str, type[Measure]] = {
    kind.name: kind
    for kind in map(vars(measure_types).__getitem__, measure_types.__all__)
    if issubclass(kind, Measure) and kind is not Measure
}
_CONVERTERS: Mapping[str, Converter] = {
    "when": to_schedule,
    "store": to_store,
    "layers": to_layers,
    "loss": to_loss,
    "output": to_output,
}
_HINTS = {**hints_of(Recorder), **hints_of(Config)}


def load_config(path: str | os.PathLike[str]) -> Config:
    """Read a configuration file: YAML that says what the arguments of `Config` say.

    Measures, schedules and stores are written by name, with the arguments they have in Python:
    `- activations: {layers: ["layer*.*"], store: {sketch: 256}, when: {every: 100}}`. The top level
    holds arguments of `Config` and of `Recorder`, and under `probes` sources of examples by name:
    `test: {entry: "data.py:make_probe"}`. Measures that do not say their probe, loss or output take
    `probe`, `loss` and `output` of the top level.

    A loss is a function of `torch.nn.functional` or a module of `torch.nn`, by its dotted name; a
    module type among `layers` is one that is imported already. **An `entry` runs code**: it imports
    the module or file that it names, when the configuration is read, and calls what makes a source.
    What it runs is said on stderr before. Nothing else in a configuration file runs anything, so
    read those of others for `entry` before you load them.

    Args:
        path: The file.

    Returns:
        The configuration.

    Raises:
        InvalidInputError: If something in it has no meaning; it tells file, key and value.
        OSError: If it cannot be read.
    """
    return read_config(path).config()


def read_config(path: str | os.PathLike[str]) -> ConfigFile:
    """Read a configuration file, whose examples may be still to come.

    Raises:
        InvalidInputError: If it is no mapping in YAML, or holds unknown names.
        OSError: If it cannot be read.
    """
    place = Place(Path(path))
    given = _read_yaml(place)
    known = sorted({item.name for item in fields(Config)} | {*recorder_options(), "probes"})
    for name in given:
        if name not in known:
            raise place.unknown(name, known, "entry of a configuration")
    probes = given.get("probes") or {}
    if not isinstance(probes, Mapping):
        raise place.below("probes").unexpected(probes, "a mapping of names to sources")
    return ConfigFile(place, given, Sources(place, probes, given.get("probe")))


@dataclass
class ConfigFile:
    """What a configuration file says.

    Attributes:
        place: The file.
        given: The values of its entries, by name.
        sources: The sources of examples that it names.
    """

    place: Place
    given: Mapping[str, Any]
    sources: Sources

    def config(self, first: Probe | None = None, **others: Any) -> Config:
        """Make the configuration.

        Args:
            first: The examples of the first batches, where somebody collects them: the source of
                what names none.
            others: Arguments of `Config` and `Recorder` that stand above those of the file.

        Raises:
            InvalidInputError: If something in the file has no meaning.
        """
        self.sources.first, self.sources.is_first_used = first, False
        stated = {"path": None, **self.given}
        elsewhere = ("probes", "probe", "measures", *others)
        options = {
            name: self._argument(name, value)
            for name, value in stated.items()
            if name not in elsewhere
        }
        options |= others
        if self.given.get("measures") is None:
            options["probe"] = self._probe()
        else:
            options["measures"] = self._measures(self.given["measures"])
            for name in ("loss", "output"):
                options.pop(name, None)  # The measures have it where they need it.
        path = options.pop("path", None)
        if path is None:
            raise self.place.error("`path` is missing: the run directory")
        with self.place.told():
            return as_config(path, options)

    def _argument(self, name: str, value: Any) -> Any:
        place = self.place.below(name)
        if value is None:
            return None
        return (
            _CONVERTERS[name](value, place)
            if name in _CONVERTERS
            else checked(value, _HINTS[name], place)
        )

    def _probe(self) -> Probe | None:
        if self.given.get("probe") is None and self.sources.first is None:
            return None
        source = self.sources.find_default(self.place)
        return None if isinstance(source, Training) else source

    def _measures(self, given: Any) -> list[Measure]:
        place = self.place.below("measures")
        if not isinstance(given, list) or not given:
            raise place.unexpected(given, "a list of measures, such as `- activations`")
        return [self._measure(item, place.below(i)) for i, item in enumerate(given)]

    def _measure(self, given: Any, place: Place) -> Measure:
        name, arguments = name_and_arguments(given, place, "a measure")
        if name not in MEASURES:
            raise place.unknown(name, list(MEASURES), "measure")
        kind: Any = MEASURES[name]
        here = place.below(name)
        parameters = inspect.signature(kind).parameters
        key = next((key for key in ("source", "probe") if key in parameters), None)
        if "inputs" in parameters:
            key = "probe"  # It takes the arrays of one.
        if arguments is None:
            arguments = {}
        if not isinstance(arguments, Mapping):
            arguments = {key or next(iter(parameters)): arguments}
        arguments = dict(arguments)
        for shared in ("loss", "output"):
            if shared in parameters and self.given.get(shared) is not None:
                arguments.setdefault(shared, self.given[shared])
        converters = dict(_CONVERTERS)
        if key is not None:
            source = self._source(kind, arguments.pop(key, None), here, key)
            made = _arrays_of(source, here.below(key)) if "inputs" in parameters else {key: source}
            arguments = made | arguments
            converters |= dict.fromkeys(made, _as_it_is)
        measure: Measure = construct(kind, arguments, here, converters)
        return measure

    def _source(self, kind: type[Measure], given: Any, place: Place, key: str) -> Probe | Training:
        if given is not None:
            return self.sources.find(given, place.below(key))
        return TRAINING if kind is OutputGradients else self.sources.find_default(place)


def _arrays_of(source: Probe | Training, place: Place) -> dict[str, Any]:
    if (
        isinstance(source, Training)
        or source.targets is None
        or not isinstance(source.inputs, torch.Tensor)
        or source.axes.batch_dim
    ):
        raise place.error("it has to be a probe of one input tensor with classes as targets")
    return {"inputs": source.inputs, "targets": source.targets, "ids": source.ids}


def _as_it_is(value: Any, place: Place) -> Any:
    return value


def _read_yaml(place: Place) -> Mapping[str, Any]:
    import yaml

    class Loader(yaml.SafeLoader):
        """YAML in which a key that stands twice is an error, as one of both would be lost."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            for i, key in enumerate(keys):
                if key in keys[:i]:
                    mark = node.value[i][0].start_mark
                    raise yaml.MarkedYAMLError(problem=f"{key!r} stands twice", problem_mark=mark)
            return super().construct_mapping(node, deep)

    text = place.file.read_bytes()
    try:
        given = yaml.load(text, Loader)
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f" in line {error.problem_mark.line + 1}"
        raise place.error(f"this is no YAML{line}: {error.problem}") from error
    except RecursionError:
        raise place.error("it is nested too deeply") from None
    except yaml.YAMLError as error:
        raise place.error(f"this is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(given, Mapping):
        raise place.unexpected(given, "a mapping, such as `path: runs/a`")
    return given
