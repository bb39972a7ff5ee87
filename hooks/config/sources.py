"""Sources of a configuration file: the training, probes by name, and the functions that make them.

A source is written as `training` or `training: {batch_dim: 1}`; as the name of an entry of
`probes`; as `entry: package.module:function` or `entry: file.py:function`, with `arguments` if it
takes some, which returns a `Probe`; or as `from: first batches`, which nobody knows before the
training runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sonde.hooks.examples.probe import Probe
from sonde.hooks.model.random_states import RandomStates
from sonde.hooks.training.source import TRAINING, Training

from .imports import entry
from .places import Place
from .values import construct

# Any, in this file: what YAML holds.

FIRST_BATCHES = "first batches"


@dataclass
class Sources:
    """The sources that a file names.

    Attributes:
        place: The file.
        named: The entries of `probes`.
        default: What stands at `probe`; None if nothing does.
        first: The examples of the first batches; None where nobody collects them.
        num_first_examples: How many of them the file asks for; None if it does not say.
        is_first_used: Whether something was made of them.
    """

    place: Place
    named: Mapping[str, Any]
    default: Any = None
    first: Probe | None = None
    num_first_examples: int | None = None
    is_first_used: bool = False
    _made: dict[str, Probe] = field(default_factory=dict)

    def find(self, given: Any, place: Place) -> Probe | Training:
        """Return the source that a value stands for.

        Raises:
            InvalidInputError: If it stands for none.
        """
        if given == Training.name:
            return TRAINING
        if isinstance(given, str):
            if given not in self.named:
                raise place.unknown(given, [Training.name, *self.named], "source")
            return self._make(self.named[given], self.place.below(f"probes.{given}"), given)
        if isinstance(given, Mapping) and list(given) == [Training.name]:
            made: Training = construct(Training, given[Training.name], place.below(Training.name))
            return made
        return self._make(given, place, None)

    def find_default(self, place: Place) -> Probe | Training:
        """Return the source of what names none.

        Raises:
            InvalidInputError: If there is none.
        """
        if self.default is not None:
            return self.find(self.default, self.place.below("probe"))
        if self.first is None:
            raise place.error(
                "its examples are missing; give it `training`, an entry of `probes`, or `entry: "
                "file.py:function`; or `probe` at the top level"
            )
        self.is_first_used = True
        return self.first

    def _make(self, given: Any, place: Place, name: str | None) -> Probe:
        if isinstance(given, Mapping) and "from" in given:
            return self._take_first(given, place)
        if not isinstance(given, Mapping) or "entry" not in given:
            raise place.unexpected(
                given,
                f"`training`, an entry of `probes`, `entry: file.py:function`, or "
                f"`from: {FIRST_BATCHES}`",
            )
        key = f"{name}: {given}"
        if key not in self._made:
            self._made[key] = _call_entry(given, place, name)
        return self._made[key]

    def _take_first(self, given: Mapping[str, Any], place: Place) -> Probe:
        _check_keys(given, ("from", "examples"), place)
        if given["from"] != FIRST_BATCHES:
            raise place.below("from").unexpected(given["from"], f"`{FIRST_BATCHES}`")
        number = given.get("examples")
        is_number = isinstance(number, int) and not isinstance(number, bool) and number > 1
        if not is_number and number is not None:
            raise place.below("examples").unexpected(number, "a whole number >= 2")
        if self.first is None:
            raise place.error(
                "only `sonde run` collects examples of the first batches; "
                "give `entry: file.py:function` instead"
            )
        self.num_first_examples, self.is_first_used = number, True
        return self.first


def _call_entry(given: Mapping[str, Any], place: Place, name: str | None) -> Probe:
    _check_keys(given, ("entry", "arguments"), place)
    here = place.below("entry")
    # What it draws must not change what the training draws.
    states = RandomStates()
    try:
        function = entry(given["entry"], here)
        made = construct(function, given.get("arguments"), place.below("arguments"))
    finally:
        states.restore()
    if not isinstance(made, Probe):
        raise here.error(f"{given['entry']} returned {type(made).__name__}; expected a sonde.Probe")
    if made.name is None:
        made.name = name
    return made


def _check_keys(given: Mapping[str, Any], known: tuple[str, ...], place: Place) -> None:
    for key in given:
        if key not in known:
            raise place.unknown(key, known, "argument of a source")
