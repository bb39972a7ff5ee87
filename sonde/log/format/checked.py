"""What log files may say: the types and the ranges of the values in their JSON.

A checksum says that bytes are as somebody wrote them, not that this was sonde. So each value is
checked once, where it is parsed, and who uses it later may trust it. What sonde does not know, such
as the details of a note, may be anything that is not nested too deeply.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from sonde.exceptions import DamageError
from sonde.visible import visible

from .payload import is_dtype, storage_dtype

# Any, in this file: JSON values.

MAX_SEQUENCE = 10**12 - 1
"""More frames than this do not fit into the names of files."""

MAX_AXES = 31
"""HDF5 has 32, one of which is the record."""

MAX_SECONDS = 1e11
"""No record was taken later: the year 5138."""

_MAX_DEPTH = 64
_MAX_INT = 2**63 - 1

_MAX_RANKS = 1 << 20


@dataclass(frozen=True)
class Kind:
    """A kind of value.

    Attributes:
        expected: How messages name it.
        holds: Tells whether a value is of it.
    """

    expected: str
    holds: Callable[[Any], bool]

    def or_none(self) -> Kind:
        """Return the kind of those values and of null."""
        return Kind(f"{self.expected} or null", lambda value: value is None or self.holds(value))


def whole(low: int = 0, high: int = _MAX_INT) -> Kind:
    """Return the kind of whole numbers in a range."""
    expected = f"a whole number from {low} to {high}"
    return Kind(expected, lambda value: type(value) is int and low <= value <= high)


def wholes(low: int = 0, high: int = _MAX_INT) -> Kind:
    """Return the kind of lists of whole numbers in a range."""

    def holds(value: Any) -> bool:
        return (
            isinstance(value, list)
            and set(map(type, value)) <= {int}
            and (not value or low <= min(value) <= max(value) <= high)
        )

    return Kind(f"a list of whole numbers from {low} to {high}", holds)


def list_of(kind: Kind) -> Kind:
    """Return the kind of lists of values of a kind."""
    return Kind(
        f"a list, of {kind.expected} each",
        lambda value: isinstance(value, list) and all(map(kind.holds, value)),
    )


def mapping_of(kind: Kind) -> Kind:
    """Return the kind of objects whose values are of a kind."""
    return Kind(
        f"an object, of {kind.expected} each",
        lambda value: isinstance(value, dict) and all(map(kind.holds, value.values())),
    )


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_shape(value: Any) -> bool:
    return len(value) <= MAX_AXES and math.prod(n for n in value if n) <= _MAX_INT


def _is_seconds(value: Any) -> bool:
    # NaN compares with nothing.
    return type(value) in (int, float) and 0 <= value <= MAX_SECONDS


TEXT = Kind("text", _is_text)
TEXTS = list_of(TEXT)
COUNT = whole()
COUNTS = wholes()


def _are_details(value: Any) -> bool:
    if not isinstance(value, list) or not set(map(type, value)) <= {dict}:
        return False
    # Nearly always all of them are flat, which is found out fast.
    inner = set(map(type, chain.from_iterable(item.values() for item in value)))
    return inner.isdisjoint({dict, list}) or all(map(is_shallow, value))


def _are_seconds(value: Any) -> bool:
    if not isinstance(value, list):
        return False
    times = [item for item in value if item is not None]
    return (
        set(map(type, times)) <= {int, float}
        and (not times or 0 <= min(times) <= max(times) <= MAX_SECONDS)
        and all(map(math.isfinite, times))
    )


STEP = whole(-_MAX_INT - 1)
STEPS = wholes(-_MAX_INT - 1)
SEQUENCE = whole(0, MAX_SEQUENCE)
SEQUENCES = wholes(0, MAX_SEQUENCE)
CHECKSUM = whole(0, 2**32 - 1)
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
SECONDS = Kind("a time in seconds", _is_seconds).or_none()
TIMES = Kind("a list of times in seconds", _are_seconds)
LIST = Kind("a list", lambda value: isinstance(value, list))
OBJECT = Kind("an object", lambda value: isinstance(value, dict))
DETAILS = Kind(
    f"an object that is nested at most {_MAX_DEPTH} deep",
    lambda value: isinstance(value, dict) and is_shallow(value),
)
ALL_DETAILS = Kind(f"a list, of {DETAILS.expected} each", _are_details)
SHAPE = Kind("the shape of an array", lambda value: COUNTS.holds(value) and _is_shape(value))
DTYPE = Kind("a dtype", lambda value: isinstance(value, str) and is_dtype(value))

EVENT = {
    "kind": TEXT,
    "step": STEP,
    "sequence": SEQUENCE,
}
"""What every frame that is neither record nor table says."""

_KNOWN_DETAILS = {
    "event": TEXT,
    "measure": TEXT.or_none(),
    "source": TEXT.or_none(),
    "reason": TEXT.or_none(),
    "name": TEXT.or_none(),
    "layer": TEXT.or_none(),
    "token": TEXT,
    "attempt": whole(0, 10**9),
    "rank": whole(0, 10**9),
    "resume_step": STEP.or_none(),
    "world_size": whole(0, _MAX_RANKS).or_none(),
    "num_records": COUNT,
    "num_notes": COUNT,
    "num_bytes": COUNT,
    "last_step": STEP,
    "reasons": TEXTS,
    "feature_shapes": mapping_of(COUNTS.or_none()).or_none(),
    "parameters": mapping_of(TEXT).or_none(),
}
"""The details of notes and other events that readers make use of."""

_KNOWN_INFO = {
    "name": TEXT.or_none(),
    "created": TEXT.or_none(),
    "environment": OBJECT.or_none(),
    "model": OBJECT.or_none(),
    "config": OBJECT.or_none(),
    "measures": list_of(OBJECT).or_none(),
    "probes": mapping_of(OBJECT.or_none()).or_none(),
}
"""What readers make use of in the description of a run."""


def parse(encoded: bytes | str) -> Any:
    """Parse JSON.

    Raises:
        DamageError: If it is none, or nested too deeply.
    """
    try:
        return json.loads(encoded)
    except RecursionError:
        raise DamageError("its JSON is nested too deeply") from None
    except ValueError as error:  # Numbers of too many digits, and bytes that are no UTF-8, too.
        raise DamageError(f"this is no JSON: {visible(error, 200)}") from None


def get(entry: Any, name: str, kind: Kind) -> Any:
    """Return a value of an object.

    Raises:
        DamageError: If it is missing or of another kind.
    """
    if not isinstance(entry, dict):
        raise DamageError(f"{_repr(entry)} stands where an object with `{name}` is expected")
    if name not in entry:
        raise DamageError(f"`{name}` is missing")
    value = entry[name]
    if not kind.holds(value):
        raise DamageError(f"`{name}` is {_repr(value)}; expected {kind.expected}")
    return value


def check(entry: Any, fields: Mapping[str, Kind]) -> None:
    """Check values of an object that must be there.

    Raises:
        DamageError: If one is missing or of another kind.
    """
    for name, kind in fields.items():
        get(entry, name, kind)


def check_event(event: Any) -> None:
    """Check what a frame says that is neither record nor table.

    Raises:
        DamageError: If readers cannot make use of it.
    """
    _check_known(event, _KNOWN_DETAILS)
    if event.get("event", "") == "" and event.get("kind") == "note":
        raise DamageError("`event` is missing")


def check_info(info: Any) -> None:
    """Check the description of a run.

    Raises:
        DamageError: If readers cannot make use of it.
    """
    _check_known(info, _KNOWN_INFO)
    _check_known(
        info.get("environment") or {},
        {"packages": OBJECT.or_none(), "devices": LIST.or_none()},
    )
    _check_known(info.get("model") or {}, {"layers": mapping_of(TEXT).or_none()})
    for measure in info.get("measures") or ():
        _check_known(measure, {"measure": TEXT.or_none(), "source": TEXT.or_none()})


def _check_known(entry: Any, fields: Mapping[str, Kind]) -> None:
    if not DETAILS.holds(entry):
        raise DamageError(f"got {_repr(entry)}; expected {DETAILS.expected}")
    check(entry, {name: kind for name, kind in fields.items() if name in entry})


def check_layout(layer: Any, field: Any, dtype: Any, shape: Any, dims: Any) -> None:
    """Check what is said of an array: its names, its element type, its shape; None if it varies.

    Raises:
        DamageError: If it is no array of a log.
    """
    entry = {"layer": layer, "field": field, "dtype": dtype, "dims": dims, "shape": shape}
    check(entry, _LAYOUT)
    if shape is not None and len(shape) != len(dims):
        raise DamageError(f"shape {_repr(shape)} has other axes than dims {_repr(dims)}")
    if shape is not None and nbytes(shape, dtype) > _MAX_INT:
        raise DamageError(f"an array of shape {_repr(shape)} is larger than any memory")


_LAYOUT = {
    "layer": TEXT.or_none(),
    "field": TEXT,
    "dtype": DTYPE,
    "dims": TEXTS,
    "shape": SHAPE.or_none(),
}


def check_shapes(table: npt.NDArray[Any], num_records: int, what: str) -> None:
    """Check a table of the shape of a stream in each record, [records, axes], padded with -1.

    Raises:
        DamageError: If it is none.
    """
    if (
        table.dtype != np.int64
        or table.ndim != 2
        or len(table) != num_records
        or table.shape[1] > MAX_AXES
        or (table < -1).any()
        or np.maximum(table, 1).prod(axis=1, dtype=np.float64).sum() > 2.0**56
    ):
        raise DamageError(f"{what} does not say the shape in each record")


def check_ids(field: str, dtype: str, num_axes: int) -> None:
    """Check that a table that is called `id` may be the ids of examples.

    Raises:
        DamageError: If it may not.
    """
    if field == "id" and (num_axes != 1 or not dtype.startswith(("int", "uint"))):
        raise DamageError(f"table 'id' is {dtype} with {num_axes} axes; expected whole numbers")


def nbytes(shape: Sequence[int], dtype: str) -> int:
    """Return the size of an array in bytes."""
    return math.prod(shape) * storage_dtype(dtype).itemsize


def is_shallow(value: Any, depth: int = _MAX_DEPTH) -> bool:
    """Tell whether a value is nested so little that every tool can walk through it."""
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list):
        return True
    inner = [item for item in value if isinstance(item, dict | list)]
    return depth > 0 and all(is_shallow(item, depth - 1) for item in inner)


def _repr(value: Any) -> str:
    return visible(repr(value), 80) if is_shallow(value) else "something nested very deeply"
