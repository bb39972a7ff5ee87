"""Arrays that are stored relative to a reference, and what makes them those of the features.

Features far from zero lose digits when they are multiplied in float32, so a reference is subtracted
from them first. What that takes away is stored beside the array, in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from sonde.log.reading.parts import Record, StreamKey

if TYPE_CHECKING:
    from .measure_log import MeasureLog

# A difference of so many roundings of a feature says nothing.
_ROUNDINGS = 4

_GRAM, _GRAM_BLOCKS, _SKETCH = "gram", "gram_blocks", "sketch"

BESIDE = {_GRAM: "gram_offset", _GRAM_BLOCKS: "gram_offset", _SKETCH: "sketch_reference"}
"""What is stored beside an array that is relative to a reference, by the field of the array."""


def is_relative(record: Record, key: StreamKey) -> bool:
    """Tell whether an array of a record is stored relative to a reference."""
    layer, field = key
    return field in BESIDE and record.part.has(record.row, (layer, BESIDE[field]))


def absolute(record: Record, key: StreamKey, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return an array of a record as that of the features, in float64 where it was relative.

    Args:
        record: The record.
        key: The array.
        values: Its values as stored.
    """
    if not is_relative(record, key):
        return values
    layer, field = key
    beside = record.part.read(record.row, (layer, BESIDE[field]))
    with np.errstate(invalid="ignore"):  # Of features that are not finite.
        if field == _GRAM:
            beside = beside[:, None] + beside[None, :]
        elif field == _GRAM_BLOCKS:
            blocks = split(beside, record.attributes["block_sizes"])
            beside = np.concatenate([np.add.outer(of_one, of_one).ravel() for of_one in blocks])
        result: npt.NDArray[np.float64] = values + beside
    return result


def is_rounding(log: MeasureLog, step: int, layer: str) -> bool:
    """Tell whether features of a layer differ between examples by rounding errors only."""
    fields = log.fields(layer)
    field = next((field for field in (_GRAM, _GRAM_BLOCKS) if field in fields), None)
    if field is None or step not in log.steps_of(BESIDE[field], layer):
        return False
    blocks = log.gram_blocks(layer, step, relative=True)
    squares = sum(float(np.trace(block)) for block in blocks)
    offsets = float(log.array(BESIDE[field], step, layer).sum())
    eps = float(np.finfo(log.describe(step)[layer, field].dtype).eps)
    return squares <= (_ROUNDINGS * eps) ** 2 * (squares + 2 * offsets)


def split(values: npt.NDArray[Any], sizes: Sequence[int]) -> list[npt.NDArray[Any]]:
    """Split an array into pieces of these sizes."""
    return np.split(values, np.cumsum(sizes)[:-1])
